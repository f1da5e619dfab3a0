//! The texts that diagnostics point into.

use std::ops::Range;

/// What a [`Source`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceKind {
    /// A file, or text given in place of one.
    File,
    /// A recipe embedded in the program.
    Builtin,
    /// The text of a flag.
    Flag,
}

/// Text that positions refer to.
#[derive(Debug)]
pub struct Source {
    name: String,
    text: String,
    kind: SourceKind,
}

impl Source {
    /// A source with the name that messages show.
    pub fn new(name: impl Into<String>, text: impl Into<String>, kind: SourceKind) -> Source {
        Source { name: name.into(), text: text.into(), kind }
    }

    /// The name that messages show: a path, or `--set`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The whole text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What it is.
    pub fn kind(&self) -> SourceKind {
        self.kind
    }

    /// Line and column of a byte offset, both from 1, the column in characters.
    pub fn line_column(&self, offset: usize) -> (usize, usize) {
        let mut offset = offset.min(self.text.len());
        while !self.text.is_char_boundary(offset) {
            offset -= 1;
        }
        let line_start = self.line_range(offset).start;
        let breaks = |(at, byte): &(usize, u8)| is_break(self.text.as_bytes(), *at, *byte);
        let line = self.text.bytes().enumerate().take(offset).filter(breaks).count() + 1;
        let column = self.text[line_start..offset].chars().filter(|c| *c != '\u{feff}').count() + 1;
        (line, column)
    }

    /// The line that holds a byte offset.
    pub fn line(&self, offset: usize) -> &str {
        self.text.get(self.line_range(offset)).unwrap_or("")
    }

    /// The bytes of the line that holds an offset, without its line break.
    pub(crate) fn line_range(&self, offset: usize) -> Range<usize> {
        let bytes = self.text.as_bytes();
        let offset = offset.min(bytes.len());
        let start = (0..offset).rev().find(|&at| is_break(bytes, at, bytes[at])).map_or(0, |at| at + 1);
        let end = (offset..bytes.len()).find(|&at| matches!(bytes[at], b'\n' | b'\r'));
        start..end.unwrap_or(bytes.len()).max(start)
    }
}

/// Whether a line ends with this byte: a line feed, or a carriage return without one, as in YAML.
fn is_break(bytes: &[u8], at: usize, byte: u8) -> bool {
    byte == b'\n' || (byte == b'\r' && bytes.get(at + 1) != Some(&b'\n'))
}
