//! `maskalign validate`: everything that can be known about recipes before the first step.

use std::path::PathBuf;

use maskalign_core::{
    Recompute,
    components::towers::{Environment, MissingWeights},
    pipeline::{self, Plan, PlanOptions},
    stages::{StageSummary, outline},
};
use maskalign_registry::{
    Recipe, Report,
    source::{Node, number},
};
use serde_json::{Map, Value, json};

use super::{Format, outline as trained};
use crate::{
    failure::Failure,
    output,
    recipes::{self, Sets},
    render::{self, paint},
    session::Session,
    table::{Table, bytes, count},
};

const EXAMPLES: &str = "\
Examples:
  maskalign validate mine.yaml
  maskalign validate recipes/*.yaml --no-environment
  maskalign validate mine.yaml --format json";

/// Check recipes: all mistakes at once, each at its place
///
/// Checks structure, references, sizes, levels, files and weights. For a recipe without mistakes it prints what each
/// stage will take (parameters, tokens, steps, memory) and what it trains (student, teachers, masker, objectives with
/// their weights). Exit code 2 if any recipe has a mistake.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Files, or names of built-in recipes
    #[arg(required = true, value_name = "RECIPE")]
    recipes: Vec<PathBuf>,
    #[command(flatten)]
    sets: Sets,
    /// Leave out what depends on this machine: data, weight files and unset variables
    #[arg(long)]
    no_environment: bool,
    /// Estimate memory for a run with --recompute
    #[arg(long)]
    recompute: bool,
    /// How the results are written
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Args {
    pub(crate) fn run(self, session: &Session) -> Result<(), Failure> {
        let mut valid = true;
        let mut records = Vec::new();
        let mut blank = "";
        for path in &self.recipes {
            let name = path.display().to_string();
            let outcome = self.check(session, path);
            valid &= outcome.is_ok();
            match (self.format, outcome) {
                (Format::Json, outcome) => records.push(record(&name, outcome)),
                (Format::Text, Ok(sound)) => output::print(&table(&name, &sound))?,
                (Format::Text, Err(report)) => {
                    output::complain(&format!("{blank}{}", render::report(&report)));
                    blank = "\n";
                }
            }
        }
        if self.format == Format::Json {
            output::print_json(&json!({ "valid": valid, "recipes": records }))?;
        }
        match valid {
            true => Ok(()),
            false => Err(Failure::Told(2)),
        }
    }

    fn check(&self, session: &Session, path: &std::path::Path) -> Result<Sound, Report> {
        let load = match self.no_environment {
            true => recipes::load_anywhere,
            false => recipes::load,
        };
        let loaded = load(session.registry, path, &self.sets.sets)?;
        let recompute = if self.recompute { Recompute::Blocks } else { Recompute::Never };
        let options = PlanOptions {
            environment: if self.no_environment { Environment::Ignored } else { Environment::Checked },
            missing_weights: MissingWeights::Refused,
            recompute,
        };
        let plan = pipeline::plan(loaded.recipe(), options).map_err(|refusals| loaded.locate_all(&refusals))?;
        let stages = loaded.document().child("stages").and_then(Node::as_map);
        let unset = loaded.unplanned().into_iter().map(|(stage, report)| (stage.to_string(), report));
        let unread = plan.unread().map(|(stage, refusals)| (stage.to_string(), loaded.locate_all(refusals)));
        let unplanned = unset.chain(unread).collect();
        Ok(Sound {
            order: stages.into_iter().flat_map(|stages| stages.keys()).cloned().collect(),
            plan,
            recipe: loaded.recipe().clone(),
            unplanned,
        })
    }
}

/// A recipe without mistakes.
struct Sound {
    /// Every stage, as written.
    order: Vec<String>,
    plan: Plan,
    recipe: Recipe,
    /// Stages that depend on variables that are not set, or on files that are not looked at, and those.
    unplanned: Vec<(String, Report)>,
}

fn record(recipe: &str, outcome: Result<Sound, Report>) -> Value {
    match outcome {
        Ok(sound) => {
            let stage = |(name, summary): (&str, &StageSummary)| {
                let mut stage = json!(summary);
                stage["outline"] = json!(sound.recipe.stages.get(name).map(outline));
                (name.to_string(), stage)
            };
            let stages: Map<String, Value> = sound.plan.summaries().map(stage).collect();
            let unplanned: Map<String, Value> =
                sound.unplanned.iter().map(|(name, report)| (name.clone(), report.to_json())).collect();
            json!({ "recipe": recipe, "valid": true, "diagnostics": [], "stages": stages, "unplanned": unplanned })
        }
        Err(report) => json!({ "recipe": recipe, "valid": false, "diagnostics": report.to_json() }),
    }
}

fn table(recipe: &str, sound: &Sound) -> String {
    type Column = (&'static str, fn(&StageSummary) -> Option<String>);
    const COLUMNS: [Column; 7] = [
        ("images", |plan| plan.images.map(|images| count(images as u64))),
        ("parameters", |plan| (plan.parameters > 0).then(|| count(plan.parameters as u64))),
        ("trained", |plan| (plan.trainable > 0).then(|| count(plan.trainable as u64))),
        ("tokens", |plan| plan.tokens.map(|(seen, all)| format!("{seen} of {all}"))),
        ("epochs", |plan| plan.epochs.map(number)),
        ("steps", |plan| plan.steps.map(count)),
        ("memory", |plan| (plan.memory > 0).then(|| format!("~ {}", bytes(plan.memory)))),
    ];
    let mut rows = Table::default();
    rows.row(std::iter::once("stage").chain(COLUMNS.map(|(name, _)| name)));
    let blank = StageSummary::default();
    for name in &sound.order {
        let plan = sound.plan.summaries().find(|(planned, _)| planned == name).map_or(&blank, |(_, summary)| summary);
        let cells = COLUMNS.map(|(_, cell)| cell(plan).unwrap_or_else(|| "-".to_string()));
        rows.row(std::iter::once(name.clone()).chain(cells));
    }
    let counts_cls = |(_, plan): (&str, &StageSummary)| {
        plan.tokens.is_some() && plan.student.as_ref().is_some_and(|student| student.shape().cls_token)
    };
    let cls = if sound.plan.summaries().any(counts_cls) { "  tokens: patches, and the class token\n" } else { "" };
    let mut text = format!(
        "{}: no mistakes\n{}{cls}{}",
        paint(render::STRONG, recipe),
        rows.render(2),
        trained::text(&sound.recipe)
    );
    for (name, summary) in sound.plan.summaries() {
        text.extend(summary.warnings.iter().map(|warning| format!("  `{name}`: {warning}\n")));
    }
    for (name, report) in &sound.unplanned {
        for unset in &report.0 {
            let place = unset.place().map(ToString::to_string).unwrap_or_default();
            text.push_str(&format!("  `{name}` is not planned: {} ({place})\n", unset.message));
        }
    }
    text
}
