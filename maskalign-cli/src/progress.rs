//! The progress of a run: a bar on a terminal, a line every ten seconds elsewhere.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use maskalign_core::{
    error::Result,
    events::{Event, Mark, Sink, StepReport},
    stages::StageSummary,
};
use serde_json::{Value, json};

use crate::{
    output,
    table::{clock, count, percent},
};

/// Time between two lines where there is no terminal.
const BETWEEN_LINES: Duration = Duration::from_secs(10);
/// Time to the line after a stage's first, which tells how long it takes.
const TO_THE_SECOND: Duration = Duration::from_secs(2);
/// Weight of the newest step in the rate that is shown.
const NEWEST: f64 = 0.1;

/// The stderr that bars and logs share.
#[derive(Clone)]
pub(crate) struct Screen(MultiProgress);

impl Default for Screen {
    fn default() -> Screen {
        let target = match io::stderr().is_terminal() {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        Screen(MultiProgress::with_draw_target(target))
    }
}

impl Screen {
    /// Runs what writes to stderr with the bars out of the way.
    pub(crate) fn above<T>(&self, write: impl FnOnce() -> T) -> T {
        self.0.suspend(write)
    }

    fn line(&self, text: &str) {
        self.above(|| output::complain(&format!("{text}\n")));
    }
}

/// Draws the progress of a run.
pub(crate) struct Reporter {
    screen: Screen,
    style: Style,
    stage: String,
    bar: ProgressBar,
    /// What the bar counts; empty while it counts steps.
    counting: String,
    meter: Option<Meter>,
    last_line: Instant,
    /// Time until the next one.
    wait: Duration,
    /// Whether the stage has shown a part of its results.
    has_shown: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Style {
    Bars,
    Lines,
    Quiet,
}

/// The rate of the steps since this process began the stage.
struct Meter {
    since: Instant,
    first_step: u64,
    seconds_per_image: f64,
}

impl Meter {
    fn new(report: &StepReport) -> Meter {
        Meter { since: Instant::now(), first_step: report.step, seconds_per_image: 1.0 / report.images_per_s }
    }

    fn update(&mut self, report: &StepReport) {
        self.seconds_per_image += NEWEST * (1.0 / report.images_per_s - self.seconds_per_image);
    }

    /// Seconds to the end of the stage; unknown after its first step, which warms up, and absent after the last.
    fn left(&self, report: &StepReport) -> Option<f64> {
        let done = report.step - self.first_step;
        let remaining = report.steps.saturating_sub(report.step + 1);
        (done > 0 && remaining > 0).then(|| self.since.elapsed().as_secs_f64() / done as f64 * remaining as f64)
    }
}

impl Reporter {
    /// Draws on the screen, or not at all.
    pub(crate) fn new(screen: Screen, quiet: bool) -> Reporter {
        let style = match (quiet, io::stderr().is_terminal()) {
            (true, _) => Style::Quiet,
            (false, true) => Style::Bars,
            (false, false) => Style::Lines,
        };
        Reporter {
            screen,
            style,
            stage: String::new(),
            bar: ProgressBar::hidden(),
            counting: String::new(),
            meter: None,
            last_line: Instant::now(),
            wait: BETWEEN_LINES,
            has_shown: false,
        }
    }

    /// Shows what is about to run, or what can be done after it.
    pub(crate) fn say(&self, text: &str) {
        if self.style != Style::Quiet {
            self.screen.above(|| output::complain(text));
        }
    }

    /// Removes the bar from the screen.
    pub(crate) fn clear(&mut self) {
        self.bar.finish_and_clear();
    }

    fn line_is_due(&mut self, last: bool) -> bool {
        let due = last || self.last_line.elapsed() >= self.wait;
        if due {
            self.last_line = Instant::now();
            self.wait = BETWEEN_LINES;
        }
        due
    }

    fn start_bar(&mut self, length: u64, counting: &str) {
        self.clear();
        self.counting = counting.to_string();
        if self.style != Style::Bars {
            return;
        }
        // The template is fixed and valid; the style that stands in for it shows the same numbers.
        let style = ProgressStyle::with_template("{prefix:.bold} {wide_bar:.cyan/blue} {pos}/{len} {elapsed} {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let prefix = match counting {
            "" => self.stage.clone(),
            counting => format!("{} {counting}", self.stage),
        };
        self.bar = self.screen.0.add(ProgressBar::new(length).with_style(style).with_prefix(prefix));
    }
}

impl Sink for &mut Reporter {
    fn handle(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::StageStarted { stage, summary } => self.stage(stage, summary),
            Event::Step(report) => self.step(report),
            Event::Evaluated(evaluation) => {
                let result = json!({ "epoch": evaluation.epoch, evaluation.name.as_str(): evaluation.result });
                self.result(&evaluation.stage, &result);
            }
            Event::Result { stage, result } => {
                self.has_shown = true;
                self.result(stage, result);
            }
            Event::StageEnded { stage, results } if !self.has_shown => {
                self.clear();
                self.result(stage, results);
            }
            Event::Progress { what, done, all } => self.count(what, *done, *all),
            Event::Saved { path } => tracing::debug!("saved {}", path.display()),
            Event::Warned { stage, text } => tracing::warn!("stage `{stage}`: {text}"),
            _ => {}
        }
        Ok(())
    }

    fn rewind(&mut self, _: Mark) -> Result<()> {
        self.meter = None;
        Ok(())
    }
}

impl Reporter {
    fn stage(&mut self, name: &str, plan: &StageSummary) {
        self.clear();
        self.stage = name.to_string();
        self.meter = None;
        self.has_shown = false;
        if self.style == Style::Quiet {
            return;
        }
        let mut parts = Vec::new();
        if let Some(images) = plan.images {
            parts.push(format!("{} images", count(images as u64)));
        }
        if let Some((seen, all)) = plan.tokens {
            let cls = plan.student.as_ref().is_some_and(|student| student.shape().cls_token);
            parts.push(format!("{seen} of {all} tokens{}", if cls { " (with the class token)" } else { "" }));
        }
        if plan.trainable > 0 {
            parts.push(format!("{} parameters to train", count(plan.trainable as u64)));
        }
        if let Some(steps) = plan.steps {
            parts.push(format!("{} steps", count(steps)));
        }
        self.screen.line(&format!("{name}: {}", parts.join(", ")));
    }

    fn step(&mut self, report: &StepReport) {
        let is_first = self.meter.is_none();
        let meter = match &mut self.meter {
            None => self.meter.insert(Meter::new(report)),
            Some(meter) => {
                meter.update(report);
                meter
            }
        };
        let left = meter.left(report).map(|seconds| format!(", {} left", clock(seconds))).unwrap_or_default();
        let mut numbers = format!("loss {:.4}, {:.0} images/s{left}", report.loss, 1.0 / meter.seconds_per_image);
        if report.skipped > 0 {
            let _ = write!(numbers, ", {} images skipped", report.skipped);
        }
        match self.style {
            Style::Quiet => {}
            Style::Bars => {
                if self.bar.is_finished() || self.bar.length() != Some(report.steps) || !self.counting.is_empty() {
                    self.start_bar(report.steps, "");
                }
                self.bar.set_position(report.step + 1);
                self.bar.set_message(format!("epoch {:.1}, {numbers}", report.epoch));
            }
            Style::Lines => {
                if self.line_is_due(left.is_empty()) {
                    let StepReport { step, steps, epoch, lr, .. } = report;
                    let at = format!("step {} of {steps}, epoch {epoch:.2}, lr {lr:.2e}", step + 1);
                    self.screen.line(&format!("{}: {at}, {numbers}", self.stage));
                }
                if is_first {
                    self.wait = TO_THE_SECOND;
                }
            }
        }
    }

    fn count(&mut self, what: &str, done: u64, all: u64) {
        match self.style {
            Style::Quiet => {}
            Style::Bars => {
                if self.bar.is_finished() || self.bar.length() != Some(all) || self.counting != what {
                    self.start_bar(all, what);
                }
                self.bar.set_position(done);
                if done >= all {
                    self.clear();
                }
            }
            Style::Lines => {
                if self.line_is_due(false) {
                    self.screen.line(&format!("{}: {what} {} of {}", self.stage, count(done), count(all)));
                }
            }
        }
    }

    fn result(&mut self, stage: &str, result: &Value) {
        if self.style != Style::Quiet {
            self.screen.line(&format!("{stage}: {}", sentence(result)));
        }
    }
}

/// Results without the accuracy that is among those by numbers of neighbours too.
pub(crate) fn undoubled(results: &Value) -> Value {
    match results {
        Value::Object(entries) => {
            let by_k = entries.get("by_k").and_then(Value::as_object);
            let is_double = |value: &Value| by_k.is_some_and(|by_k| by_k.values().any(|other| other == value));
            let kept = entries.iter().filter(|(name, value)| *name != "accuracy" || !is_double(value));
            kept.map(|(name, value)| (name.clone(), undoubled(value))).collect()
        }
        other => other.clone(),
    }
}

/// A result in one line: `student accuracy 83.1 %`. Lists, which hold the course of something, are left out.
fn sentence(result: &Value) -> String {
    let mut parts = Vec::new();
    let result = &undoubled(result);
    let mut open = vec![(Vec::new(), result)];
    while let Some((path, value)) = open.pop() {
        match value {
            Value::Object(map) => {
                // The last one put in is taken out first.
                for (key, value) in map.iter().rev() {
                    open.push(([path.as_slice(), &[key.as_str()]].concat(), value));
                }
            }
            Value::Array(_) => {}
            value => parts.push(format!("{} {}", path.join(" "), number(&path.join("."), value))),
        }
    }
    parts.join(", ")
}

/// A value of a result by its path: accuracies and their deviations as per cent, other fractions with four digits.
pub(crate) fn number(path: &str, value: &Value) -> String {
    match value.as_f64() {
        Some(share) if path.contains("accuracy") || path.contains("by_k.") || path.ends_with("deviation") => {
            percent(share)
        }
        Some(epochs) if value.is_f64() && ["epoch", "epochs"].iter().any(|name| path.ends_with(name)) => {
            let text = format!("{epochs:.2}");
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        }
        Some(number) if value.is_f64() && number.fract() != 0.0 => format!("{number:.4}"),
        Some(number) if value.is_f64() => format!("{number}"),
        _ => match value {
            Value::String(text) => text.clone(),
            Value::Number(number) => number.as_u64().map_or_else(|| number.to_string(), count),
            other => other.to_string(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_a_sentence() {
        assert_eq!(sentence(&json!({ "student": { "accuracy": 0.8312 } })), "student accuracy 83.1 %");
        assert_eq!(sentence(&json!({ "epoch": 2, "accuracy": 0.5 })), "epoch 2, accuracy 50.0 %");
        assert_eq!(sentence(&json!({ "epochs": 20.04, "steps": 501 })), "epochs 20.04, steps 501");
        assert_eq!(sentence(&json!({ "epochs": 100.0 })), "epochs 100");
        assert_eq!(sentence(&json!({ "loss": 0.5, "knn": [{ "accuracy": 0.5 }] })), "loss 0.5000");
        let few = json!({ "student": { "1_per_class": { "accuracy": 0.5, "deviation": 0.015 } } });
        assert_eq!(sentence(&few), "student 1_per_class accuracy 50.0 %, student 1_per_class deviation 1.5 %");
        let by_k = json!({ "student": { "accuracy": 0.5, "by_k": { "10": 0.5, "20": 0.25 } } });
        assert_eq!(sentence(&by_k), "student by_k 10 50.0 %, student by_k 20 25.0 %");
    }
}
