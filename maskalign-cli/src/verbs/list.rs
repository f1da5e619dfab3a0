//! `maskalign list`: the recipes and components that can be named.

use maskalign_core::embedded;
use maskalign_registry::{Entry, Kind, plugin::nearest};
use serde_json::{Value, json};

use super::Format;
use crate::{
    failure::Failure,
    output,
    render::{self, paint},
    session::Session,
};

const EXAMPLES: &str = "\
Examples:
  maskalign list                recipes and components
  maskalign list recipes
  maskalign list maskers        the components of one kind
  maskalign list components --format json";

/// List recipes and components
///
/// Components are those that are built in and those of plugins that are linked into this binary.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// recipes, components, kinds, or a kind such as masker; all of them if left out
    what: Option<String>,
    /// How the list is written
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

enum What {
    All,
    Recipes,
    Kinds,
    Components,
    Of(Kind),
}

impl What {
    fn parse(name: &str) -> Result<What, Failure> {
        let kind = Kind::ALL.into_iter().find(|kind| [kind.name(), kind.plural()].contains(&name));
        match (name, kind) {
            ("recipes", _) => Ok(What::Recipes),
            ("kinds", _) => Ok(What::Kinds),
            ("components", _) => Ok(What::Components),
            (_, Some(kind)) => Ok(What::Of(kind)),
            _ => {
                let known: Vec<&str> =
                    ["recipes", "components", "kinds"].into_iter().chain(Kind::ALL.map(Kind::name)).collect();
                let mut failure = Failure::mistake(format!("there is no list of `{name}`"));
                if let Some(near) = nearest(name, known.iter().copied()).first() {
                    failure = failure.help(format!("did you mean `{near}`?"));
                }
                Err(failure.help(format!("known lists: {}", known.join(", "))))
            }
        }
    }
}

impl Args {
    pub(crate) fn run(self, session: &Session) -> Result<(), Failure> {
        let what = self.what.as_deref().map_or(Ok(What::All), What::parse)?;
        let entries: Vec<&Entry> = session.registry.entries().collect();
        match self.format {
            Format::Text => output::print(&text(&what, &entries))?,
            Format::Json => output::print_json(&data(&what, &entries))?,
        }
        Ok(())
    }
}

fn text(what: &What, entries: &[&Entry]) -> String {
    match what {
        What::All => format!("{}\n{}", recipes(), components(entries)),
        What::Recipes => recipes(),
        What::Kinds => {
            section("kinds", &Kind::ALL.map(|kind| (kind.name().to_string(), kind.description().to_string())))
        }
        What::Components => components(entries),
        What::Of(kind) => of_kind(entries, *kind),
    }
}

fn components(entries: &[&Entry]) -> String {
    Kind::ALL.map(|kind| of_kind(entries, kind)).join("\n")
}

fn of_kind(entries: &[&Entry], kind: Kind) -> String {
    let lines: Vec<(String, String)> = entries
        .iter()
        .filter(|entry| entry.kind == kind)
        .map(|entry| (entry.name.to_string(), format!("{}{}", entry.summary, from_plugin(entry))))
        .collect();
    section(kind.plural(), &lines)
}

/// Names the crate of a component that is not built in.
pub(super) fn from_plugin(entry: &Entry) -> String {
    match entry.package {
        "maskalign-core" => String::new(),
        package => format!(" (from {package})"),
    }
}

fn recipes() -> String {
    let lines: Vec<(String, String)> =
        embedded::RECIPES.iter().map(|(name, text)| (name.to_string(), summary(text).to_string())).collect();
    section("recipes", &lines)
}

/// The first line of a recipe's header comment, after the line that is for editors.
fn summary(text: &str) -> &str {
    text.lines()
        .map_while(|line| line.strip_prefix('#'))
        .map(str::trim)
        .find(|line| !line.is_empty() && !line.starts_with("yaml-language-server:"))
        .unwrap_or("")
}

fn section(title: &str, lines: &[(String, String)]) -> String {
    let width = lines.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let mut out = format!("{}\n", paint(render::STRONG, title));
    for (name, summary) in lines {
        out.push_str(format!("  {name:<width$}  {summary}").trim_end());
        out.push('\n');
    }
    out
}

fn data(what: &What, entries: &[&Entry]) -> Value {
    let recipes = || -> Vec<Value> {
        embedded::RECIPES.iter().map(|(name, text)| json!({ "name": name, "summary": summary(text) })).collect()
    };
    let kinds = || Kind::ALL.map(|kind| json!({ "name": kind.name(), "description": kind.description() }));
    let components = |wanted: Option<Kind>| -> Vec<Value> {
        entries
            .iter()
            .filter(|entry| wanted.is_none_or(|kind| entry.kind == kind))
            .map(|entry| {
                json!({
                    "kind": entry.kind.name(),
                    "name": entry.name,
                    "summary": entry.summary,
                    "paper": entry.paper,
                    "example": entry.example,
                    "package": entry.package,
                })
            })
            .collect()
    };
    match what {
        What::All => {
            json!({ "recipes": recipes(), "kinds": kinds(), "components": components(None) })
        }
        What::Recipes => json!(recipes()),
        What::Kinds => json!(kinds()),
        What::Components => json!(components(None)),
        What::Of(kind) => json!(components(Some(*kind))),
    }
}
