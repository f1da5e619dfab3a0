//! `maskalign runs list`: the runs below a folder, with their state.

use std::path::{Path, PathBuf};

use maskalign_core::run::{Overview, RunState, find, overview};
use serde_json::{Value, json};

use crate::{failure::Failure, output, progress::number, recipes, report::run_name, table::Table};

const EXAMPLES: &str = "\
Examples:
  maskalign runs list
  maskalign runs list /data/experiments --json";

/// List the runs below a folder: state, progress, best result
///
/// A run is finished, running (a process has its lock), stopped (`run --resume` goes on with it), damaged, or outdated (an
/// earlier version made it). The best result is the highest accuracy of its finished stages, else the lowest loss; where a
/// stage compares a student with others, it is the student's. Runs are sorted by when they began.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// The folder; a run directory lists itself
    #[arg(default_value = "runs", value_name = "DIR")]
    folder: PathBuf,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// A run and what its recipe says of it.
struct Row {
    overview: Overview,
    /// The path from the folder that was listed.
    name: String,
    recipe: Option<String>,
    /// The stages of the recipe.
    stages: Option<usize>,
    /// Epochs of the stage that the run stands in.
    epochs: Option<f64>,
}

impl Args {
    pub(super) fn run(self) -> Result<(), Failure> {
        let shown = self.folder.display();
        if !self.folder.is_dir() {
            let failure = Failure::mistake(format!("there is no folder {shown}"));
            return Err(match self.folder == Path::new("runs") {
                true => failure.help("runs go there unless `run --out DIR` names another: maskalign runs list DIR"),
                false => failure,
            });
        }
        let mut rows = Vec::new();
        for path in find(&self.folder)? {
            match overview(&path) {
                Ok(overview) => rows.push(Row::of(overview, &self.folder)),
                // It was removed in the meantime.
                Err(_) if !path.is_dir() => {}
                Err(error) => return Err(error.into()),
            }
        }
        rows.sort_by(|a, b| (&a.overview.started, &a.name).cmp(&(&b.overview.started, &b.name)));
        if self.json {
            let records: Vec<Value> = rows.iter().map(Row::json).collect();
            return Ok(output::print_json(&json!(records))?);
        }
        if rows.is_empty() {
            return Ok(output::print(&format!("there are no runs in {shown}\n"))?);
        }
        Ok(output::print(&text(&rows))?)
    }
}

impl Row {
    fn of(overview: Overview, folder: &Path) -> Row {
        let recipe = overview.recipe.as_deref().and_then(|text| recipes::resolved(text).ok());
        let stages = recipe.as_ref().and_then(|recipe| recipe.get("stages")?.as_object());
        let epochs = overview.position.as_ref().and_then(|at| stages?.get(&at.stage)?.get("epochs")?.as_f64());
        let inside = overview.path.strip_prefix(folder).ok().filter(|inside| !inside.as_os_str().is_empty());
        Row {
            name: inside.map_or_else(|| run_name(&overview.path), |inside| inside.display().to_string()),
            stages: stages.map(serde_json::Map::len),
            epochs,
            recipe: recipe.as_ref().and_then(|recipe| Some(recipe.get("name")?.as_str()?.to_owned())),
            overview,
        }
    }

    /// The share of the stage that the run stands in.
    fn share(&self) -> Option<f64> {
        let at = self.overview.position.as_ref()?;
        Some((at.epoch / self.epochs?).clamp(0.0, 1.0))
    }

    fn progress(&self) -> String {
        let done = self.overview.finished_stages.len();
        let position = self.overview.position.as_ref().filter(|_| self.overview.state != RunState::Finished);
        match (position, self.share(), self.stages) {
            (Some(at), Some(share), _) => format!("{} {:.0} %", at.stage, (100.0 * share).floor()),
            (Some(at), None, _) => format!("{} step {}", at.stage, at.steps),
            (None, _, Some(all)) => format!("{done} of {all} stages"),
            (None, _, None) => "-".to_owned(),
        }
    }

    fn best(&self) -> String {
        match &self.overview.best {
            None => "-".to_owned(),
            Some(best) => {
                let value = number(&best.name, &json!(best.value));
                let word = if best.name.ends_with("loss") { " loss" } else { "" };
                format!("{}{word} {value}", best.stage)
            }
        }
    }

    fn json(&self) -> Value {
        let mut record = json!(self.overview);
        record["name"] = json!(self.name);
        record["path"] = json!(self.overview.path.display().to_string());
        record["recipe"] = json!(self.recipe);
        record["stages"] = json!(self.stages);
        record["share"] = json!(self.share());
        record
    }
}

fn text(rows: &[Row]) -> String {
    // By default a run is called after its recipe, which is then not worth a column.
    let is_told = |row: &Row| row.recipe.as_ref().is_some_and(|recipe| !row.name.starts_with(recipe.as_str()));
    let with_recipe = rows.iter().any(is_told);
    let mut table = Table::of_words();
    let mut add = |name: &str, recipe: &str, rest: [&str; 4]| {
        let recipe = with_recipe.then_some(recipe);
        table.row([name].into_iter().chain(recipe).chain(rest));
    };
    add("run", "recipe", ["state", "progress", "best", "began (UTC)"]);
    for row in rows {
        let began = row.overview.started.as_deref().unwrap_or("-");
        let began: String = began.chars().take("2023-06-18T09:30".len()).collect();
        let state = row.overview.state.word();
        let recipe = row.recipe.as_deref().unwrap_or("-");
        add(&row.name, recipe, [state, &row.progress(), &row.best(), &began.replace('T', " ")]);
    }
    let mut text = table.render(0);
    for row in rows.iter().filter(|row| row.overview.state == RunState::Damaged) {
        if let Some(fault) = &row.overview.fault {
            text.push_str(&format!("`{}`: {fault}\n", row.name));
        }
    }
    for (state, hint) in [
        (RunState::Stopped, "to go on with a stopped run: maskalign run --resume"),
        (RunState::Failed, "to see why a run failed: maskalign runs replay"),
    ] {
        if let Some(row) = rows.iter().find(|row| row.overview.state == state) {
            text.push_str(&format!("{hint} {}\n", row.overview.path.display()));
        }
    }
    text
}
