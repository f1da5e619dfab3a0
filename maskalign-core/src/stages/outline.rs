//! What a stage trains, in a few words a line: for people who check a recipe before it runs.

use maskalign_registry::{Options, Scalar, Slot, StageTag, source::number};
use serde::Serialize;
use serde_json::Value;

/// One line of an outline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OutlineLine {
    /// What it is about: `views`, `student`, `teacher`, `masker`, `objective`, `evaluation`, or what is `left`.
    pub part: &'static str,
    /// Its name in the recipe, where it has one.
    pub name: Option<String>,
    /// The few words.
    pub says: String,
}

impl OutlineLine {
    fn of(part: &'static str, says: String) -> OutlineLine {
        OutlineLine { part, name: None, says }
    }

    fn named(part: &'static str, name: &str, says: String) -> OutlineLine {
        OutlineLine { part, name: Some(name.to_owned()), says }
    }
}

/// The views of an image where there are several, the student, the teachers, the masker, the objectives and the evaluations of a stage whose defaults are filled in, in this
/// order; then what it leaves, where that is not what it trained last.
///
/// It reads the recipe by the names of these options, so that it says the same of a plugin's stage.
pub fn outline(stage: &Slot<StageTag>) -> Vec<OutlineLine> {
    let options = &stage.options;
    let entries = |name: &str| options.get(name).and_then(Value::as_object).into_iter().flatten();
    let mut lines = Vec::new();
    lines.extend(options.get("data").and_then(views).map(|says| OutlineLine::of("views", says)));
    lines.extend(options.get("student").and_then(tower).map(|says| OutlineLine::of("student", says)));
    lines
        .extend(entries("teachers").filter_map(|(name, slot)| Some(OutlineLine::named("teacher", name, tower(slot)?))));
    let of_views = options.get("masked_views").and_then(names).map_or(String::new(), |views| format!(", of {views}"));
    let masker = options.get("masker").map(|masker| component(masker) + &of_views);
    lines.extend(masker.map(|says| OutlineLine::of("masker", says)));
    lines.extend(entries("objectives").map(|(name, terms)| OutlineLine::named("objective", name, objective(terms))));
    lines.extend(
        entries("evaluations").map(|(name, judged)| OutlineLine::named("evaluation", name, evaluation(judged))),
    );
    lines.extend(left(options).map(|says| OutlineLine::of("left", says)));
    lines
}

/// The views of an image, with the number of crops where a view has several.
fn views(data: &Value) -> Option<String> {
    let views = data.get("views")?.as_object().filter(|views| !views.is_empty())?;
    let view = |(name, view): (&String, &Value)| match view.get("count").and_then(Value::as_u64) {
        None | Some(1) => name.clone(),
        Some(count) => format!("{count} {name}"),
    };
    Some(views.iter().map(view).collect::<Vec<_>>().join(", "))
}

/// A list of names, or the one.
fn names(list: &Value) -> Option<String> {
    let names: Vec<&str> = list.as_array()?.iter().filter_map(Value::as_str).collect();
    Some(names.join(", "))
}

/// A tower: its type, size and where it comes from.
fn tower(tower: &Value) -> Option<String> {
    let origin = |weights: &Value| {
        let stage = weights.get("stage").and_then(Value::as_str);
        let path = weights.as_str().or_else(|| weights.get("path")?.as_str());
        let name = |path: &str| path.rsplit('/').next().unwrap_or(path).to_owned();
        stage.map(str::to_owned).or_else(|| path.map(name)).map(|origin| format!("from {origin}"))
    };
    if tower.get("type").is_none() {
        // Weights in the place of a tower: an earlier stage's student.
        return origin(tower);
    }
    let arch = tower.get("arch").and_then(|arch| match arch {
        Value::String(name) => Some(name.clone()),
        arch => Some(format!("{} wide, {} deep", arch.get("dim")?, arch.get("depth")?)),
    });
    let weights = tower.get("weights").and_then(origin);
    Some([word(tower, "type").map(str::to_owned), arch, weights].into_iter().flatten().collect::<Vec<_>>().join(", "))
}

/// A component: its type and every option that is one value.
fn component(component: &Value) -> String {
    let Some(options) = component.as_object() else {
        return "none: the student sees every patch".to_owned();
    };
    let mut parts: Vec<String> = word(component, "type").map(str::to_owned).into_iter().collect();
    parts.extend(one_values(options).map(|(name, value)| format!("{name} {value}")));
    parts.join(", ")
}

fn one_values(options: &Options) -> impl Iterator<Item = (&str, String)> {
    let others = options.iter().filter(|(name, _)| *name != "type");
    others.filter_map(|(name, value)| match value {
        Value::String(text) => Some((name.as_str(), text.clone())),
        value => Some((name.as_str(), scalar(value)?)),
    })
}

/// An objective: how much it counts, and what is compared with what, on which tokens.
fn objective(terms: &Value) -> String {
    let kind = |part: &str| terms.get(part).and_then(|part| word(part, "type")).unwrap_or("nothing");
    let whose = terms.get("target").and_then(|target| word(target, "teacher"));
    let whose = whose.map_or(String::new(), |teacher| format!(" of {teacher}"));
    let tokens = terms.get("tokens").and_then(Value::as_array).into_iter().flatten();
    let tokens: Vec<&str> = tokens.filter_map(Value::as_str).collect();
    let weight = terms.get("weight").and_then(scalar).unwrap_or_else(|| "1".to_owned());
    let compared = terms.get("views").filter(|views| views.is_object()).map_or(String::new(), |views| {
        let student = views.get("student").and_then(names).unwrap_or_default();
        let target = views.get("target").and_then(names).unwrap_or_else(|| student.clone());
        match word(views, "pairs") {
            Some("different") => format!(", each crop of {student} with the others of {target}"),
            Some("all") => format!(", each crop of {student} with all of {target}"),
            _ => format!(", of {student}"),
        }
    });
    format!("weight {weight}, {} to {}{whose}, on {}{compared}", kind("loss"), kind("target"), tokens.join(", "))
}

/// What is left in place of what was trained last: an average, or the best by a metric.
fn left(options: &serde_json::Map<String, Value>) -> Option<String> {
    let momentum = options.get("ema").and_then(|ema| ema.get("momentum")).map(Value::to_string);
    let average = momentum.map(|momentum| format!("the moving average, momentum {momentum}"));
    let best = options.get("best").filter(|best| best.is_object()).map(|best| {
        let metric = word(best, "metric").unwrap_or("accuracy");
        let every = match best.get("every_epochs").and_then(Value::as_u64) {
            Some(1) | None => "each epoch".to_owned(),
            Some(every) => format!("every {every} epochs"),
        };
        let ends = best
            .get("patience_epochs")
            .and_then(Value::as_u64)
            .map_or(String::new(), |patience| format!("; ends early after {patience} epochs without a better one"));
        format!("the best by {metric} on eval, {every}{ends}")
    });
    match (average, best) {
        (Some(average), Some(best)) => Some(format!("{average}, of it {best}")),
        (average, best) => average.or(best),
    }
}

/// A stage that judges the student in the course of its training.
fn evaluation(judged: &Value) -> String {
    let kind = judged.get("stage").and_then(|stage| word(stage, "type")).unwrap_or("nothing");
    match judged.get("every_epochs").and_then(Value::as_u64) {
        Some(1) => format!("{kind}, every epoch"),
        every => format!("{kind}, every {} epochs", every.unwrap_or_default()),
    }
}

/// A number, or the two that it moves between.
fn scalar(value: &Value) -> Option<String> {
    match serde_json::from_value(value.clone()).ok()? {
        Scalar::Constant(value) => Some(number(value)),
        Scalar::Ramp { from, to, .. } => Some(format!("{} to {}", number(from), number(to))),
    }
}

fn word<'v>(value: &'v Value, name: &str) -> Option<&'v str> {
    value.get(name)?.as_str()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn lines(options: Value) -> Vec<(String, String)> {
        let Value::Object(options) = options else { panic!("options are a mapping") };
        let name =
            |line: &OutlineLine| line.name.as_ref().map_or(line.part.to_owned(), |n| format!("{} {n}", line.part));
        outline(&Slot::with("any", options)).into_iter().map(|line| (name(&line), line.says)).collect()
    }

    #[test]
    fn what_is_trained_is_named_with_its_weight() {
        let towers = json!({ "type": "clip", "arch": "base_16", "weights": "hf://openai/clip-vit-base-patch16" });
        let found = lines(json!({
            "student": { "type": "vit", "arch": { "dim": 96, "depth": 4 }, "weights": null },
            "teachers": { "clip": towers, "ema": { "type": "ema", "momentum": { "from": 0.996, "to": 1.0 } } },
            "masker": { "type": "attention", "teacher": "clip", "ratio": { "from": 0.5, "to": 0.7 }, "visible": null },
            "objectives": {
                "align": {
                    "target": { "type": "features", "teacher": "clip" }, "tokens": ["cls", "visible"],
                    "loss": { "type": "smooth_l1" }, "weight": 2.0,
                },
                "pixels": { "target": { "type": "pixels" }, "tokens": ["masked"], "loss": { "type": "mse" } },
            },
            "evaluations": {
                "few": { "every_epochs": 5, "stage": { "type": "few_shot", "levels": "all" } },
                "rank": { "every_epochs": 1, "stage": { "type": "quality" } },
            },
        }));
        let expected = [
            ("student", "vit, 96 wide, 4 deep"),
            ("teacher clip", "clip, base_16, from clip-vit-base-patch16"),
            ("teacher ema", "ema"),
            ("masker", "attention, teacher clip, ratio 0.5 to 0.7"),
            ("objective align", "weight 2, smooth_l1 to features of clip, on cls, visible"),
            ("objective pixels", "weight 1, mse to pixels, on masked"),
            ("evaluation few", "few_shot, every 5 epochs"),
            ("evaluation rank", "quality, every epoch"),
        ];
        assert_eq!(found, expected.map(|(name, says)| (name.to_owned(), says.to_owned())));
    }

    #[test]
    fn views_are_named_with_what_is_compared() {
        let found = lines(json!({
            "data": { "views": { "global": { "count": 2 }, "local": { "count": 10 }, "whole": {} } },
            "masker": { "type": "random", "ratio": 0.5 }, "masked_views": ["global"],
            "objectives": {
                "cls": { "target": { "type": "features", "teacher": "ema" }, "tokens": ["cls"], "loss": { "type": "mse" },
                    "views": { "student": ["global", "local"], "target": ["global"], "pairs": "different" } },
                "patches": { "target": { "type": "pixels" }, "tokens": ["masked"], "loss": { "type": "mse" },
                    "views": { "student": ["global"], "target": null, "pairs": "same" } },
            },
        }));
        let expected = [
            ("views", "2 global, 10 local, whole"),
            ("masker", "random, ratio 0.5, of global"),
            (
                "objective cls",
                "weight 1, mse to features of ema, on cls, each crop of global, local with the others of global",
            ),
            ("objective patches", "weight 1, mse to pixels, on masked, of global"),
        ];
        assert_eq!(found, expected.map(|(name, says)| (name.to_owned(), says.to_owned())));
    }

    #[test]
    fn what_is_left_is_said_where_it_is_not_the_last() {
        let left = |ema: Value, best: Value| lines(json!({ "ema": ema, "best": best })).pop().map(|(_, says)| says);
        assert_eq!(left(Value::Null, Value::Null), None);
        assert_eq!(
            left(json!({ "momentum": 0.9999 }), Value::Null).as_deref(),
            Some("the moving average, momentum 0.9999")
        );
        let best = json!({ "metric": "accuracy", "every_epochs": 1, "patience_epochs": 5 });
        let says = "the best by accuracy on eval, each epoch; ends early after 5 epochs without a better one";
        assert_eq!(left(Value::Null, best).as_deref(), Some(says));
        let best = json!({ "metric": "loss", "every_epochs": 2, "patience_epochs": null });
        let says = "the moving average, momentum 0.5, of it the best by loss on eval, every 2 epochs";
        assert_eq!(left(json!({ "momentum": 0.5 }), best).as_deref(), Some(says));
    }

    #[test]
    fn a_stage_that_evaluates_names_its_towers_and_a_strange_one_nothing() {
        let knn = lines(json!({ "student": { "stage": "pretrain" }, "masker": null, "teachers": {} }));
        let expected = [("student", "from pretrain"), ("masker", "none: the student sees every patch")];
        assert_eq!(knn, expected.map(|(name, says)| (name.to_owned(), says.to_owned())));
        assert_eq!(lines(json!({ "student": 3, "objectives": [1], "teachers": { "a": null } })), []);
    }
}
