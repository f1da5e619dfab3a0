//! `maskalign runs compare`: what differs between runs, in their recipes and in their results.

use std::path::{Path, PathBuf};

use maskalign_core::run::{BadLines, Difference, Metric, Overview, RunState, differences, measured, overview};
use serde_json::{Value, json};

use super::told;
use crate::{
    failure::Failure,
    output,
    progress::number,
    recipes,
    render::{self, paint},
    report::run_name,
    table::Table,
};

const EXAMPLES: &str = "\
Examples:
  maskalign runs compare runs/a runs/b
  maskalign runs compare runs/seed-* --markdown > comparison.md";

/// Columns of a terminal.
const WIDTH: usize = 80;

/// Compare runs: what differs in their recipes, and their results side by side
///
/// Of the resolved recipes it prints the values that are not the same in all, by path. Of the results it prints each
/// metric's last value, and where its name tells which is the best (a loss, an accuracy), that one too.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// Run directories
    #[arg(required = true, num_args = 2.., value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// As JSON
    #[arg(long, conflicts_with = "markdown")]
    json: bool,
    /// As tables in Markdown
    #[arg(long)]
    markdown: bool,
}

/// A run to compare.
struct Run {
    overview: Overview,
    recipe: Value,
    metrics: Vec<Metric>,
    bad: BadLines,
}

/// A metric in every run: `last` and `best` of those that have it.
struct Line {
    stage: String,
    name: String,
    values: Vec<Option<(f64, Option<f64>)>>,
}

impl Args {
    pub(super) fn run(self) -> Result<(), Failure> {
        let runs: Vec<Run> = self.runs.iter().map(|path| Run::read(path)).collect::<Result<_, _>>()?;
        let recipes: Vec<&Value> = runs.iter().map(|run| &run.recipe).collect();
        let differences = differences(&recipes);
        let lines = lines(&runs);
        match (self.json, self.markdown) {
            (true, _) => output::print_json(&as_json(&runs, &differences, &lines))?,
            (_, true) => output::print(&markdown(&runs, &differences, &lines))?,
            _ => output::print(&text(&runs, &differences, &lines))?,
        }
        runs.iter().try_for_each(|run| told(&run.overview.path, &run.bad))
    }
}

impl Run {
    fn read(path: &Path) -> Result<Run, Failure> {
        let (metrics, bad) = measured(path)?;
        let overview = overview(path)?;
        let file = path.join("recipe.resolved.yaml");
        let Some(text) = &overview.recipe else {
            return Err(Failure::mistake(format!("{} is not there: the run has no recipe to compare", file.display())));
        };
        let recipe = recipes::resolved(text)
            .map_err(|error| Failure::mistake(format!("{} is damaged: {error}", file.display())))?;
        Ok(Run { overview, recipe, metrics, bad })
    }

    fn name(&self) -> String {
        run_name(&self.overview.path)
    }

    fn recipe_name(&self) -> &str {
        self.recipe.get("name").and_then(Value::as_str).unwrap_or("-")
    }
}

/// The metrics of all runs: those of the first in its order, then those that only others have.
fn lines(runs: &[Run]) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for (at, run) in runs.iter().enumerate() {
        for metric in &run.metrics {
            let known = lines.iter().position(|line| line.stage == metric.stage && line.name == metric.name);
            let known = known.unwrap_or_else(|| {
                let values = vec![None; runs.len()];
                lines.push(Line { stage: metric.stage.clone(), name: metric.name.clone(), values });
                lines.len() - 1
            });
            lines[known].values[at] = Some((metric.last, metric.best));
        }
    }
    lines
}

impl Line {
    /// A row for the last value, and one for the best where it is another.
    fn rows(&self) -> Vec<(String, Vec<String>)> {
        let show = |value: f64| number(&self.name, &json!(value));
        let last: Vec<String> =
            self.values.iter().map(|value| value.map_or_else(|| "-".to_owned(), |(last, _)| show(last))).collect();
        let best: Vec<String> = self
            .values
            .iter()
            .map(|value| value.and_then(|(_, best)| best).map_or_else(|| "-".to_owned(), show))
            .collect();
        let name = format!("{} {}", self.stage, self.name);
        match best == last || best.iter().all(|best| best == "-") {
            true => vec![(name, last)],
            false => vec![(format!("{name}, last"), last), (format!("{name}, best"), best)],
        }
    }
}

fn as_json(runs: &[Run], differences: &[Difference], lines: &[Line]) -> Value {
    let of_run = |run: &Run| {
        let path = run.overview.path.display().to_string();
        json!({ "path": path, "name": run.name(), "recipe": run.recipe_name(), "state": run.overview.state })
    };
    let part = |line: &Line, part: fn((f64, Option<f64>)) -> Option<f64>| -> Vec<Option<f64>> {
        line.values.iter().map(|value| value.and_then(part)).collect()
    };
    let of_line = |line: &Line| {
        json!({
            "stage": line.stage,
            "metric": line.name,
            "last": part(line, |(last, _)| Some(last)),
            "best": part(line, |(_, best)| best),
        })
    };
    json!({
        "runs": runs.iter().map(of_run).collect::<Vec<_>>(),
        "recipe": differences,
        "results": lines.iter().map(of_line).collect::<Vec<_>>(),
    })
}

/// A value of a recipe; a dash where there is none, and of a mapping its type.
fn shown(value: Option<&Value>) -> String {
    match value {
        None => "-".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Object(entries)) => {
            entries.get("type").and_then(Value::as_str).map_or("{...}".to_owned(), |name| format!("{name} {{...}}"))
        }
        Some(other) => other.to_string(),
    }
}

fn markdown(runs: &[Run], differences: &[Difference], lines: &[Line]) -> String {
    let escaped = |text: &str| text.replace('|', "\\|");
    let row = |first: &str, cells: &[String]| {
        let cells: Vec<String> = cells.iter().map(|cell| escaped(cell)).collect();
        format!("| {} | {} |\n", escaped(first), cells.join(" | "))
    };
    let names: Vec<String> = runs.iter().map(Run::name).collect();
    let head = |first: &str| format!("{}|---|{}\n", row(first, &names), "---:|".repeat(runs.len()));
    let mut out = String::new();
    if differences.is_empty() {
        out.push_str("The recipes are the same.\n");
    } else {
        out.push_str(&head("recipe"));
        for difference in differences {
            let cells: Vec<String> = difference.values.iter().map(|value| shown(value.as_ref())).collect();
            out.push_str(&row(&format!("`{}`", difference.path), &cells));
        }
    }
    out.push('\n');
    out.push_str(&head("result"));
    for (name, cells) in lines.iter().flat_map(Line::rows) {
        out.push_str(&row(&name, &cells));
    }
    out
}

/// `A`, `B`, ..., `Z`, `27`, ...
fn letter(at: usize) -> String {
    match u8::try_from(at) {
        Ok(at @ 0..26) => char::from(b'A' + at).to_string(),
        _ => (at + 1).to_string(),
    }
}

fn text(runs: &[Run], differences: &[Difference], lines: &[Line]) -> String {
    let mut legend = Table::of_words();
    for (at, run) in runs.iter().enumerate() {
        let state = match run.overview.state {
            RunState::Finished => String::new(),
            state => state.word().to_owned(),
        };
        legend.row([letter(at), run.overview.path.display().to_string(), state]);
    }
    let letters: Vec<String> = (0..runs.len()).map(letter).collect();
    let paths = differences.iter().map(|difference| difference.path.as_str());
    let results: Vec<(String, Vec<String>)> = lines.iter().flat_map(Line::rows).collect();
    let longest = paths.chain(results.iter().map(|(name, _)| name.as_str())).map(|name| name.chars().count()).max();
    let room = WIDTH.saturating_sub(2 + longest.unwrap_or(0)) / runs.len().max(1);
    let room = room.saturating_sub(2).max(LEAST);
    let mut table = Table::default();
    let heading = |name: &str| std::iter::once(name.to_owned()).chain(letters.iter().cloned());
    if !differences.is_empty() {
        table.row(heading("recipe"));
    }
    for difference in differences {
        let cells = difference.values.iter().map(|value| cut(&shown(value.as_ref()), room));
        table.row(std::iter::once(format!("  {}", difference.path)).chain(cells));
    }
    if !results.is_empty() {
        table.row(heading("results"));
    }
    for (name, cells) in results {
        table.row(std::iter::once(format!("  {name}")).chain(cells));
    }
    let same = if differences.is_empty() { "the recipes are the same\n" } else { "" };
    let mut out = format!("{}\n{same}", legend.render(0));
    for line in table.render(0).lines() {
        let is_heading = !line.starts_with(' ');
        out.push_str(&if is_heading { paint(render::STRONG, line) } else { line.to_owned() });
        out.push('\n');
    }
    out
}

/// The least that is shown of a value.
const LEAST: usize = 12;

/// Text cut to a width.
fn cut(text: &str, width: usize) -> String {
    match text.chars().count() > width {
        true => text.chars().take(width.saturating_sub(1)).chain(['…']).collect(),
        false => text.to_owned(),
    }
}
