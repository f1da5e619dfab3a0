//! `maskalign explain`: a component, its options and an example.

use maskalign_registry::{Entry, Kind, OptionDoc};
use serde_json::json;

use super::{Format, list::from_plugin};
use crate::{
    failure::Failure,
    output,
    render::{self, paint},
    session::Session,
};

/// Columns of text.
const WIDTH: usize = 100;

const EXAMPLES: &str = "\
Examples:
  maskalign explain masker.attention
  maskalign explain attention          where only one kind has a component of that name
  maskalign explain masker             what a masker is, and which there are";

/// Explain a component: what it does, its options, an example, the paper
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// KIND.NAME, a name that only one kind has, or a kind
    component: String,
    /// How the explanation is written
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Args {
    pub(crate) fn run(self, session: &Session) -> Result<(), Failure> {
        let name = self.component.trim();
        let entry = match (Kind::from_name(name), session.registry.find(name)) {
            (Some(kind), _) => {
                let entries: Vec<&Entry> = session.registry.of_kind(kind).collect();
                return Ok(self.kind(kind, &entries)?);
            }
            (None, Ok(entry)) => entry,
            (None, Err(near)) => {
                let mut failure = Failure::mistake(format!("there is no component `{name}`"));
                if !near.is_empty() {
                    let near: Vec<String> = near.iter().map(|address| format!("`{address}`")).collect();
                    failure = failure.help(format!("did you mean {}?", near.join(" or ")));
                }
                return Err(failure.help("`maskalign list components` names all of them"));
            }
        };
        let options = session.registry.options(entry);
        match self.format {
            Format::Text => output::print(&text(entry, &options))?,
            Format::Json => output::print_json(&json!({
                "kind": entry.kind.name(),
                "name": entry.name,
                "summary": entry.summary,
                "paper": entry.paper,
                "package": entry.package,
                "example": entry.example,
                "options": options,
            }))?,
        }
        Ok(())
    }

    fn kind(&self, kind: Kind, entries: &[&Entry]) -> std::io::Result<()> {
        match self.format {
            Format::Text => {
                let mut text = format!("{}: {}\n\n", paint(render::STRONG, kind.name()), kind.description());
                for entry in entries {
                    text.push_str(&format!(
                        "  {}: {}{}\n",
                        paint(render::STRONG, &entry.address()),
                        entry.summary,
                        from_plugin(entry)
                    ));
                    text.push_str(&format!("    {}\n", entry.example));
                }
                output::print(&text)
            }
            Format::Json => {
                let components: Vec<_> = entries
                    .iter()
                    .map(|entry| json!({ "name": entry.name, "summary": entry.summary, "example": entry.example }))
                    .collect();
                output::print_json(&json!({
                    "kind": kind.name(),
                    "description": kind.description(),
                    "components": components,
                }))
            }
        }
    }
}

fn text(entry: &Entry, options: &[OptionDoc]) -> String {
    let mut out = format!("{}: {}{}\n", paint(render::STRONG, &entry.address()), entry.summary, from_plugin(entry));
    if !entry.paper.is_empty() {
        out.push_str(&format!("paper: {}\n", entry.paper));
    }
    out.push_str(&format!("\n{}\n", paint(render::STRONG, "options")));
    if options.is_empty() {
        out.push_str("  none\n");
    }
    for option in options {
        let presence = match (&option.default, option.required) {
            (_, true) => "; required".to_string(),
            (None | Some(serde_json::Value::Null), false) => "; may be left out".to_string(),
            (Some(default), false) => format!("; default {default}"),
        };
        out.push_str(&format!("  {}: {}{presence}\n", paint(render::STRONG, &option.name), option.expected));
        for line in wrapped(&option.description, WIDTH - 6) {
            out.push_str(&format!("      {line}\n"));
        }
        if let Some(kind) = option.kind {
            out.push_str(&format!("      which there are: maskalign list {kind}\n"));
        }
    }
    out.push_str(&format!(
        "\n{}\n  {}: {}\n",
        paint(render::STRONG, "example"),
        place_in_recipe(entry.kind),
        entry.example
    ));
    out
}

/// The key that holds a component of a kind in a recipe.
fn place_in_recipe(kind: Kind) -> &'static str {
    match kind {
        Kind::Stage => "NAME",
        Kind::Teacher => "NAME",
        Kind::Transform => "transforms",
        kind => kind.name(),
    }
}

/// Text in lines of at most `width` characters, broken at spaces.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_string()),
        }
    }
    lines
}
