//! `maskalign verify`: computes the numbers of another implementation again, and compares.

use std::path::{Path, PathBuf};

use maskalign_core::{Context, error::Result as CoreResult};
use maskalign_registry::{Input, LoadRequest, Loaded, Recipe};
use maskalign_testkit::replay::{Case, CaseReport};
use serde_json::{Value, json};

use super::machine::Machine;
use crate::{
    failure::Failure,
    output,
    recipes::{Embedded, Sets},
    render::{self, paint},
    session::Session,
    table::Table,
};

const EXAMPLES: &str = "\
Examples:
  maskalign verify tests/fixtures/cases/*.safetensors
  maskalign verify mae.safetensors --tolerance 1e-5 --json
  maskalign verify base.safetensors --set stages.pretrain.objectives.align.aligner.fusion=simple   (fails)";

/// Replay steps that another implementation recorded, and compare
///
/// A case holds images, masks, starting weights and what the other implementation computed from them; docs/papers.md
/// describes the files. It is run as a recipe, by the stage that `run` uses. Shown is the largest relative error of each kind of quantity: the norm
/// of the difference over the norm of the recorded tensor. Exit code 1 where one is over the tolerance, 2 where a case
/// cannot be read or does not go with a `--set`; the other cases are replayed all the same.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Case files (safetensors; maskalign-case-v2 or -v1)
    #[arg(required = true, value_name = "CASE")]
    cases: Vec<PathBuf>,
    #[command(flatten)]
    sets: Sets,
    /// The largest relative error that passes
    #[arg(long, value_name = "ERROR", default_value_t = 1e-4)]
    tolerance: f64,
    /// Write the errors as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: Machine,
}

impl Args {
    pub(crate) fn run(self, session: &Session) -> Result<(), Failure> {
        let cx = self.machine.open()?;
        let mut code = 0;
        let mut records = Vec::new();
        for path in &self.cases {
            // The other cases may be fine.
            let outcome = self.replay(session, &cx, path);
            let agrees = matches!(&outcome, Ok(report) if report.error() <= self.tolerance);
            code = code.max(outcome.as_ref().err().map_or(u8::from(!agrees), Failure::code));
            match (self.json, outcome) {
                (true, outcome) => records.push(record(path, &outcome, agrees)),
                (false, Ok(report)) => output::print(&self.table(path, &report, agrees))?,
                (false, Err(failure)) => {
                    output::complain(&format!("{}: {}\n", path.display(), paint(render::ERROR, "not replayed")));
                    output::complain(&failure.text());
                }
            }
        }
        if self.json {
            output::print_json(&json!({ "tolerance": self.tolerance, "passed": code == 0, "cases": records }))?;
        }
        match code {
            0 => Ok(()),
            code => Err(Failure::Told(code)),
        }
    }

    fn replay(&self, session: &Session, cx: &Context, path: &Path) -> Result<CaseReport, Failure> {
        let case = Case::read(path)?;
        let scratch =
            tempfile::tempdir().map_err(|error| Failure::failed(format!("cannot make a temporary folder: {error}")))?;
        case.write_teachers(scratch.path())?;
        let input = Input::Text { name: format!("{} as a recipe", path.display()), text: case.recipe().to_owned() };
        let variable = Case::variable(scratch.path());
        let request = LoadRequest { input, sets: &self.sets.sets, env: &variable, builtins: &Embedded };
        let loaded: Loaded = Recipe::load(&request, session.registry)?;
        let replayed: CoreResult<CaseReport> = case.replay(cx, loaded.recipe());
        replayed.map_err(|error| Failure::located(error, &loaded))
    }

    fn table(&self, path: &Path, report: &CaseReport, agrees: bool) -> String {
        let (style, verdict) = match agrees {
            true => (render::STRONG, "agrees"),
            false => (render::ERROR, "differs"),
        };
        let mut rows = Table::default();
        // Infinite: missing on one side, of another shape, or not a number.
        let shown = |error: f64| match error.is_finite() {
            true => format!("{error:.2e}"),
            false => "not comparable".to_string(),
        };
        rows.row(["quantity", "tensors", "largest error", "in"]);
        for quantity in &report.quantities {
            rows.row([
                quantity.name.to_string(),
                quantity.tensors.to_string(),
                shown(quantity.error),
                quantity.worst.clone(),
            ]);
        }
        let (case, error, tolerance) = (path.display(), shown(report.error()), self.tolerance);
        format!("{case}: {} ({error}, tolerance {tolerance:.0e})\n{}", paint(style, verdict), rows.render(2))
    }
}

fn record(path: &Path, outcome: &Result<CaseReport, Failure>, agrees: bool) -> Value {
    let case = path.display().to_string();
    match outcome {
        Ok(report) => json!({
            "case": case,
            "passed": agrees,
            "error": report.error(),
            "quantities": report.quantities,
            "losses": report.losses,
        }),
        Err(failure) => json!({ "case": case, "passed": false, "diagnostics": failure.to_json() }),
    }
}
