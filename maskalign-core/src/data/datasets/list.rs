//! The text of image lists: what is read, and what else people write, answered with the way out.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::path::{Path, PathBuf};

use super::files::{bare_variable, odd_letter};
use super::{first_of, some_of};

/// Labels from here on are refused: more likely a mistake than a class.
const LABELS: u32 = 1_000_000;

/// Path and label of an image.
pub(super) type Entry = (Box<Path>, Option<u32>);

/// What a list holds.
#[derive(Debug)]
pub(super) struct List {
    pub entries: Vec<Entry>,
    /// What is no mistake, but may not be meant.
    pub notes: Vec<String>,
}

/// A line that cannot be read.
#[derive(Debug)]
pub(super) struct Fault {
    /// Counted from 1.
    pub line: usize,
    pub message: String,
    /// The way out.
    pub help: String,
}

fn fault(line: usize, message: impl Into<String>, help: impl Into<String>) -> Fault {
    Fault { line, message: message.into(), help: help.into() }
}

/// A line's path and label as they are written.
struct Row<'a> {
    line: usize,
    path: Cow<'a, str>,
    label: Option<Cow<'a, str>>,
}

/// Reads a list. `root` is where relative paths start, `classes` the names by label where they are given.
pub(super) fn parse(bytes: &[u8], root: &Path, classes: Option<&[String]>) -> Result<List, Fault> {
    let text = decoded(bytes)?;
    let mut lines = numbered_lines(text);
    let mut notes = Vec::new();
    let header = match lines.clone().next() {
        Some((line, first)) => Header::of(line, first)?,
        None => None,
    };
    let rows: Vec<Row<'_>> = match header {
        Some(header) => {
            lines.next();
            notes.extend(header.note());
            lines.map(|(line, text)| header.row(line, text)).collect::<Result<_, _>>()?
        }
        None => lines.map(|(line, text)| plain_row(line, text, root)).collect::<Result<_, _>>()?,
    };
    let names = Names::of(classes);
    let mut entries: Vec<Entry> = Vec::with_capacity(rows.len());
    for row in &rows {
        check_path(row, root)?;
        let is_labelled = rows[0].label.is_some();
        if row.label.is_some() != is_labelled {
            return Err(match is_labelled {
                true => fault(
                    row.line,
                    "expected a label after the path, as on the lines before",
                    "give every line a label, or none",
                ),
                false => fault(
                    row.line,
                    "found a label, where the lines before have none",
                    "give every line a label, or none",
                ),
            });
        }
        let label = row.label.as_deref().map(|label| read_label(row.line, label, &rows, &names)).transpose()?;
        entries.push((PathBuf::from(&*row.path).into_boxed_path(), label));
    }
    check_labels(&rows, &entries, classes)?;
    notes.extend(check_repeats(&rows, &entries)?);
    Ok(List { entries, notes })
}

/// The text, which is UTF-8.
fn decoded(bytes: &[u8]) -> Result<&str, Fault> {
    let save = "save the list as UTF-8";
    if bytes.starts_with(&[0xFF, 0xFE]) || bytes.starts_with(&[0xFE, 0xFF]) {
        return Err(fault(1, "the list is in UTF-16, as PowerShell's `>` and some editors write", save));
    }
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
    let line_of = |at: usize| bytes[..at].split(|&byte| byte == b'\n').count();
    if let Some(at) = bytes.iter().position(|&byte| byte == 0) {
        let help = "name a text file with one path a line";
        return Err(fault(line_of(at), "found a zero byte, which no text holds", help));
    }
    std::str::from_utf8(bytes).map_err(|error| {
        let at = error.valid_up_to();
        fault(line_of(at), format!("expected text in UTF-8, found the byte 0x{:02X}", bytes[at]), save)
    })
}

/// The lines that hold something, without spaces around them; they end as on Linux, Windows or an old Macintosh.
fn numbered_lines(text: &str) -> impl Iterator<Item = (usize, &str)> + Clone {
    let is_old = !text.contains('\n');
    let lines = text.split(move |letter| letter == '\n' || is_old && letter == '\r');
    lines.enumerate().map(|(index, line)| (index + 1, line.trim())).filter(|(_, line)| !line.is_empty())
}

/// Names of columns, in lower case; the first counts where there are several.
const PATHS: [&str; 16] = [
    "path",
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image",
    "image_path",
    "imagepath",
    "img",
    "img_path",
    "image_file",
    "image_name",
    "name",
    "images",
    "paths",
];
const LABEL_COLUMNS: [&str; 15] = [
    "label",
    "class_id",
    "label_id",
    "class_index",
    "class_idx",
    "label_idx",
    "target",
    "category_id",
    "class",
    "category",
    "labels",
    "y",
    "class_name",
    "target_id",
    "classid",
];

/// The first line of a CSV file.
struct Header {
    separator: char,
    columns: Vec<String>,
    path: usize,
    label: Option<usize>,
}

impl Header {
    /// The columns, where the line names some; `None` where it is an image like the others.
    fn of(line: usize, text: &str) -> Result<Option<Self>, Fault> {
        for separator in [',', ';', '\t'] {
            let Some(fields) = fields(text, separator) else { continue };
            let columns: Vec<String> = fields.iter().map(|field| field.trim().to_lowercase()).collect();
            let find = |names: &[&str]| names.iter().find_map(|name| columns.iter().position(|column| column == name));
            let (path, label) = (find(&PATHS), find(&LABEL_COLUMNS));
            match path {
                Some(path) if columns.len() > 1 || separator == '\t' => {
                    return Ok(Some(Self { separator, columns, path, label }));
                }
                None if label.is_some() && columns.len() > 1 => {
                    let found = columns.join("`, `");
                    return Err(fault(
                        line,
                        format!("found the columns `{found}`, and none of them is a path"),
                        "call the column of paths `path`",
                    ));
                }
                _ => {}
            }
        }
        let words: Vec<String> = text.split_whitespace().map(str::to_lowercase).collect();
        let known = |word: &String| PATHS.contains(&word.as_str()) || LABEL_COLUMNS.contains(&word.as_str());
        if words.len() > 1 && words.iter().all(known) {
            return Err(fault(
                line,
                format!("`{text}` names columns and no image"),
                "remove the line; or set the columns apart by commas, and the list is read as CSV",
            ));
        }
        Ok(None)
    }

    /// What to say of columns that are not read.
    fn note(&self) -> Option<String> {
        let unread: Vec<String> = (0..self.columns.len())
            .filter(|&index| index != self.path && !self.columns[index].is_empty())
            .map(|index| format!("`{}`", self.columns[index]))
            .collect();
        (self.label.is_none() && !unread.is_empty()).then(|| {
            format!("no column is called `label`, so that the images have no labels; not read: {}", some_of(&unread))
        })
    }

    fn row<'a>(&self, line: usize, text: &'a str) -> Result<Row<'a>, Fault> {
        let Some(mut fields) = fields(text, self.separator) else {
            return Err(fault(
                line,
                "a quote is not closed",
                "close it on the same line; a quote in a path is written twice",
            ));
        };
        if fields.len() != self.columns.len() {
            return Err(fault(
                line,
                format!("found {} fields, where the first line names {} columns", fields.len(), self.columns.len()),
                "put a path that holds a comma into double quotes",
            ));
        }
        let label = self.label.map(|label| std::mem::take(&mut fields[label]));
        if label.as_deref().is_some_and(|label| label.trim().is_empty()) {
            return Err(fault(line, "the label is empty", "give the image a label, or remove the line"));
        }
        Ok(Row { line, path: std::mem::take(&mut fields[self.path]), label })
    }
}

/// The fields of a line of CSV (RFC 4180), `None` where a quote is not closed.
fn fields(line: &str, separator: char) -> Option<Vec<Cow<'_, str>>> {
    let mut fields = Vec::new();
    let mut rest = line;
    loop {
        let trimmed = rest.trim_start_matches(' ');
        if let Some(quoted) = trimmed.strip_prefix('"') {
            let mut value = String::new();
            let mut rest_of = quoted;
            loop {
                let end = rest_of.find('"')?;
                value.push_str(&rest_of[..end]);
                rest_of = &rest_of[end + 1..];
                match rest_of.strip_prefix('"') {
                    Some(after) => {
                        value.push('"');
                        rest_of = after;
                    }
                    None => break,
                }
            }
            fields.push(value.into());
            match rest_of.trim_start_matches(' ').strip_prefix(separator) {
                Some(after) => rest = after,
                None => return rest_of.trim().is_empty().then_some(fields),
            }
        } else {
            match rest.split_once(separator) {
                Some((field, after)) => {
                    fields.push(field.trim().into());
                    rest = after;
                }
                None => {
                    fields.push(rest.trim().into());
                    return Some(fields);
                }
            }
        }
    }
}

/// A line without a header above: a path, or a path and a label after a tab or a space.
fn plain_row<'a>(line: usize, text: &'a str, root: &Path) -> Result<Row<'a>, Fault> {
    let row = |path: &'a str, label: Option<&'a str>| Row {
        line,
        path: path.trim_end().into(),
        label: label.map(|label| label.trim().into()),
    };
    if let Some((path, label)) = text.rsplit_once('\t') {
        return Ok(row(path, Some(label)));
    }
    match split_row(line, text) {
        Ok((path, label)) if label.is_none_or(is_number) => Ok(row(path, label)),
        // A file that is there is meant, whatever it is called.
        _ if root.join(text).is_file() => Ok(row(text, None)),
        Ok((path, label)) => Ok(row(path, label)),
        Err(fault) => Err(fault),
    }
}

/// Path and label of a line without tabs.
fn split_row(line: usize, text: &str) -> Result<(&str, Option<&str>), Fault> {
    for (separator, name) in [(',', "a comma"), (';', "a semicolon")] {
        if let Some((path, label)) = text.rsplit_once(separator)
            && (has_image_ending(path.trim().trim_matches('"')) || is_number(label.trim()))
        {
            let way_out = format!(
                "put a tab in its place; or write the line `path{separator}label` above, and the list is read as CSV"
            );
            return Err(fault(line, format!("path and label stand apart by {name}"), way_out));
        }
    }
    if text.starts_with(['{', '[']) {
        return Err(fault(line, "found JSON", "write one path a line, and after a tab its label"));
    }
    if text.starts_with('#') {
        let help = "remove the line; a path that begins so is written `./#...`";
        return Err(fault(line, "found `#` at the start, and lists have no comments", help));
    }
    if text.starts_with('"') {
        let help = "remove the quotes and put a tab before the label; or write the line `path,label` above and a comma before the label, and the list is read as CSV";
        return Err(fault(line, "the path is in quotes", help));
    }
    let Some((path, label)) = text.rsplit_once(' ') else { return Ok((text, None)) };
    let path = path.trim_end();
    let before = path.rsplit_once(' ').filter(|(_, number)| is_number(number)).map(|(before, _)| before.trim_end());
    if is_number(label) && before.is_some_and(has_image_ending) {
        return Err(fault(line, "found more than one label", "give each image one label"));
    }
    if let Some((first, rest)) = text.split_once(' ')
        && is_number(first)
        && has_image_ending(rest)
    {
        let message = format!("the label `{first}` stands before the path");
        return Err(fault(line, message, "write the path first, then its label"));
    }
    if is_number(label) {
        return Ok((path, Some(label)));
    }
    // Words after a file's name are a label, though they may turn out not to be a number.
    let mut places = text.match_indices(' ').map(|(at, _)| text.split_at(at));
    Ok(match places.find(|(path, _)| has_image_ending(path)) {
        Some((path, label)) => (path, Some(label)),
        None => (text, None),
    })
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Whether a path ends like an image's.
fn has_image_ending(path: &str) -> bool {
    /// Of an ending with its dot.
    const LONGEST: usize = 5;
    const ENDINGS: [&str; 14] =
        ["jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp", "gif", "pbm", "pnm", "jfif", "jpe"];
    // The last few bytes alone: a long line is asked about at each of its spaces.
    let end = path.as_bytes();
    let end = &end[end.len().saturating_sub(LONGEST)..];
    let ending = end.iter().rposition(|&byte| byte == b'.').map(|dot| &end[dot + 1..]);
    ending.is_some_and(|ending| ENDINGS.iter().any(|known| ending.eq_ignore_ascii_case(known.as_bytes())))
}

/// Refuses what is no path of this machine.
fn check_path(row: &Row<'_>, root: &Path) -> Result<(), Fault> {
    let path = &*row.path;
    let refused = |message: String, help: &str| Err(fault(row.line, message, help));
    if path.is_empty() {
        return refused("the path is empty".into(), "name the image, or remove the line");
    }
    if let Some((scheme, _)) = path.split_once("://") {
        return match scheme {
            "file" => refused(format!("`{path}` is an address"), "write the path without `file://`"),
            _ => refused(format!("`{path}` is an address, not a file"), "get the images, and list their paths"),
        };
    }
    if path.starts_with("${") || path.starts_with('$') && bare_variable(path).is_some() {
        return refused(
            format!("`{path}`: variables are not filled in in a list"),
            "write paths from `root` on, and the variable there",
        );
    }
    if path.starts_with("~/") {
        return refused(
            format!("`{path}`: `~` does not stand for the home folder in a list"),
            "write it out, or set `root`",
        );
    }
    let is_drive = |bytes: &[u8]| {
        bytes.len() > 2 && bytes[0].is_ascii_alphabetic() && bytes[1] == b':' && matches!(bytes[2], b'\\' | b'/')
    };
    if cfg!(not(windows)) && (is_drive(path.as_bytes()) || path.starts_with(r"\\")) {
        return refused(
            format!("`{path}` is a path of another machine, with Windows"),
            "list paths that start from `root`, with `/` between folders",
        );
    }
    if cfg!(not(windows)) && path.contains('\\') && !root.join(path).exists() {
        return refused(
            format!("`{path}` is a path as Windows writes it"),
            "write `/` between folders: `sed -i 's:\\\\:/:g' LIST` does it",
        );
    }
    Ok(())
}

/// The classes by name, where they are named.
struct Names<'a>(Option<HashMap<&'a str, u32>>);

impl<'a> Names<'a> {
    fn of(classes: Option<&'a [String]>) -> Self {
        Self(classes.map(|names| names.iter().map(String::as_str).zip(0..).collect()))
    }

    fn label(&self, name: &str) -> Option<u32> {
        self.0.as_ref()?.get(name).copied()
    }
}

fn read_label(line: usize, label: &str, rows: &[Row<'_>], names: &Names<'_>) -> Result<u32, Fault> {
    if is_number(label) {
        return match label.parse::<u32>() {
            Ok(number) if number < LABELS => Ok(number),
            _ => Err(fault(
                line,
                format!("expected a label from 0 to {}, found `{label}`", LABELS - 1),
                "number the classes from 0 on",
            )),
        };
    }
    if let Some(label) = names.label(label) {
        return Ok(label);
    }
    if let Some(letter) = odd_letter(label) {
        let message = format!("expected a label from 0 to {}, found `{label}`, which holds {letter}", LABELS - 1);
        return Err(fault(line, message, "write the digits alone"));
    }
    if let Ok(number) = label.parse::<f64>() {
        let help = if number < 0.0 {
            "labels count from 0; where -1 stands for images without one, remove those lines or all labels"
        } else if number.fract() == 0.0 {
            "write whole numbers; pandas writes them after `.astype(int)`"
        } else {
            "labels are the numbers of classes, from 0 on"
        };
        let kind = if number < 0.0 { "negative" } else { "a decimal number" };
        return Err(fault(
            line,
            format!("expected a label from 0 to {}, found `{label}`, which is {kind}", LABELS - 1),
            help,
        ));
    }
    let help = match names.0 {
        Some(_) => "`classes` has no such name: spell it as there".to_owned(),
        None => {
            let names: BTreeSet<&str> = rows.iter().filter_map(|row| row.label.as_deref()).collect();
            let names: Vec<&str> = names.into_iter().collect();
            if names.len() > 50 {
                format!("number the {} classes from 0 on, or name them all in `classes`", names.len())
            } else {
                let quoted: Vec<String> = names.iter().map(|name| format!("{name:?}")).collect();
                format!("name the classes in the dataset's options: `classes: [{}]`", quoted.join(", "))
            }
        }
    };
    Err(fault(line, format!("expected a label from 0 to {}, found `{label}`", LABELS - 1), help))
}

/// Refuses labels that do not count from 0 without a gap, unless the classes are named.
fn check_labels(rows: &[Row<'_>], entries: &[Entry], classes: Option<&[String]>) -> Result<(), Fault> {
    let Some(most) = entries.iter().filter_map(|entry| entry.1).max() else { return Ok(()) };
    let line_of = |label: u32| {
        let at = entries.iter().position(|entry| entry.1 == Some(label));
        at.map_or(1, |at| rows[at].line)
    };
    if let Some(classes) = classes {
        if most as usize >= classes.len() {
            let message = format!("found the label {most}, where `classes` names {} classes", classes.len());
            return Err(fault(line_of(most), message, "labels count from 0; name every class"));
        }
        return Ok(());
    }
    let mut seen = vec![false; most as usize + 1];
    entries.iter().filter_map(|entry| entry.1).for_each(|label| seen[label as usize] = true);
    let mut missing = (0..=most).filter(|&label| !seen[label as usize]);
    let count = missing.clone().count();
    if count == 0 {
        return Ok(());
    }
    if count == 1 && !seen[0] {
        let message = format!("the labels go from 1 to {most}, and labels count from 0");
        return Err(fault(
            line_of(1),
            message,
            "take 1 from each; or, where no image here has class 0, name all classes in `classes`",
        ));
    }
    let message = format!(
        "the labels go up to {most} and leave out {count} of the numbers before: {}",
        first_of(missing.by_ref().map(|label| label.to_string()), count)
    );
    let help = "number the classes from 0 on without a gap; or, where this list holds some of the classes only, name all of them in `classes`";
    Err(fault(line_of(most), message, help))
}

/// Refuses an image that has two labels, and counts those that are named twice.
fn check_repeats(rows: &[Row<'_>], entries: &[Entry]) -> Result<Option<String>, Fault> {
    // By hash alone, to stay small where a list is long; what has the same hash is compared.
    let hasher = BuildHasherDefault::<DefaultHasher>::default();
    let mut seen: HashMap<u64, usize> = HashMap::with_capacity(entries.len());
    let mut repeats = 0;
    let mut example = None;
    for (at, (path, label)) in entries.iter().enumerate() {
        let first = *seen.entry(hasher.hash_one(path.as_os_str())).or_insert(at);
        if first == at || entries[first].0.as_os_str() != path.as_os_str() {
            continue;
        }
        if let (Some(before), Some(label)) = (entries[first].1, label)
            && before != *label
        {
            let message =
                format!("`{}` has the label {label}, and {before} on line {}", path.display(), rows[first].line);
            return Err(fault(rows[at].line, message, "give each image one label"));
        }
        repeats += 1;
        example.get_or_insert_with(|| path.display().to_string());
    }
    Ok(example.map(|path| {
        format!("{repeats} lines name an image that was named before, such as `{path}`: it counts each time")
    }))
}
