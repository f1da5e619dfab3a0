//! How well images of a class are found by an image of it.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use maskalign_engine::{
    Context, Tape, Tensor,
    ops::{self, Act, LinearWeights},
};
use maskalign_registry::{LevelRef, Refusal, With};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    Data, PlannedJudge, PlannedStage, Stage, StageContext, StageRun, StageSummary, Tower, View,
    data::{PlannedSides, Sides},
    features::{each_batch, extract_blocks, scale_to_length_1},
    measured::{MeasuredTowers, Measures, Measuring, PlannedTowers},
    memory,
};
use crate::{component, components::towers::StudentPlan, error::Result, register};

/// Mean average precision of the images of a query's class among all images of a gallery, ranked by the cosine similarity of
/// features.
///
/// The average precision of a query is the mean, over the gallery's images of its class, of the precision among the images
/// that are at least as similar: images of equal similarity count together, as in scikit-learn. The features of the gallery
/// are held, those of the queries go by in batches. `map` is the mean over the
/// queries, `by_class` the means over those of each class. A query whose class the gallery lacks does not count.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Retrieval(With<MeasuredTowers, RetrievalOptions>);

/// The options that are the stage's own.
#[component]
struct RetrievalOptions {
    /// Labelled images that are ranked.
    gallery: Data,
    /// Labelled images that they are ranked by.
    queries: Data,
}

/// Retrieval whose options fit.
struct PlannedRetrieval {
    summary: StageSummary,
    sides: PlannedSides,
    towers: PlannedTowers,
}

impl Retrieval {
    /// Plans to measure the towers of the options, or a student in training.
    fn plan_measures(
        &self,
        cx: &StageContext,
        trained: Option<&StudentPlan>,
    ) -> Result<PlannedRetrieval, Vec<Refusal>> {
        let With { shared, own } = &self.0;
        let mut refusals = Vec::new();
        let mut summary = StageSummary::default();
        let options = Sides { searched: ("gallery", &own.gallery), seekers: ("queries", &own.queries) };
        let sides = options.plan(cx.environment, "retrieval", &mut refusals);
        if let Some(sides) = &sides {
            options.record(sides, cx.name, &mut summary);
            summary.images = sides.searched.opened().map(|_| sides.lengths().iter().sum());
        }
        let size = sides.as_ref().map_or(0, |sides| sides.searched.size);
        let towers = shared.plan(cx, trained, size, &mut refusals);
        let (Some(sides), Some(towers)) = (sides, towers) else { return Err(refusals) };
        summary.memory += memory::ranking(&towers.shapes(), towers.pixels(), sides.lengths(), size, shared.batch);
        Ok(PlannedRetrieval { summary, sides, towers })
    }
}

impl Stage for Retrieval {
    fn plan(&self, cx: &StageContext) -> Result<Box<dyn PlannedStage>, Vec<Refusal>> {
        Ok(Box::new(Measuring(self.plan_measures(cx, None)?)))
    }

    fn plan_judge(&self, cx: &StageContext, student: &StudentPlan) -> Result<Box<dyn PlannedJudge>, Vec<Refusal>> {
        Ok(Box::new(Measuring(self.plan_measures(cx, Some(student))?)))
    }
}

impl Measures for PlannedRetrieval {
    fn summary(&self) -> &StageSummary {
        &self.summary
    }

    fn towers(&self) -> &PlannedTowers {
        &self.towers
    }

    fn measure(
        &self,
        run: &mut StageRun,
        tower: &Tower,
        view: View,
        levels: Option<&[LevelRef]>,
        _shown: Option<&str>,
    ) -> Result<Vec<Value>> {
        let (cx, gallery, queries) = (run.cx, self.sides.searched.open()?, self.sides.seekers.open()?);
        let mut sought: Vec<Vec<Tensor>> = Vec::new();
        let seen = extract_blocks(run, tower, gallery, view, levels, &mut |level, block| {
            if sought.len() <= level {
                sought.push(Vec::new());
            }
            sought[level].push(block);
            Ok(())
        })?;
        let (labels, missing) = (seen.labels(gallery)?, seen.skipped);
        // Queries go by: their number costs no memory.
        let mut found: Vec<Vec<Option<f64>>> = vec![Vec::new(); sought.len()];
        let seen = each_batch(run, tower, queries, view, levels, &mut |level, state, places| {
            let features = state.pooled(cx, view.pooling)?;
            let (mut values, width) = (features.to_vec(), features.columns());
            scale_to_length_1(&mut values, width)?;
            let block = cx.tensor(values, places.len(), width)?;
            let label = |place: &usize| queries.images.label(*place).unwrap_or(u32::MAX);
            let classes: Vec<u32> = places.iter().map(label).collect();
            found[level].extend(precisions(cx, &sought[level], &labels, &block, &classes)?);
            Ok(())
        })?;
        let (classes, more_missing) = (seen.labels(queries)?, seen.skipped);
        let name = gallery.class_names();
        let result = |found: &Vec<Option<f64>>| {
            let mut result = Map::new();
            result.insert("map".into(), mean(found.iter().flatten()).into());
            let mut by_class: BTreeMap<u32, Vec<&f64>> = BTreeMap::new();
            for (class, found) in classes.iter().zip(found) {
                by_class.entry(*class).or_default().extend(found);
            }
            let by_class = by_class.into_iter().filter(|(_, found)| !found.is_empty());
            let by_class = by_class.map(|(class, found)| (name(class as usize), mean(found.into_iter()).into()));
            result.insert("by_class".into(), Value::Object(by_class.collect()));
            if missing + more_missing > 0 {
                result.insert("skipped".into(), (missing + more_missing).into());
            }
            Value::Object(result)
        };
        Ok(found.iter().map(result).collect())
    }
}

/// The mean of some values; 0 of none.
fn mean<'a>(values: impl Iterator<Item = &'a f64>) -> f64 {
    let (mut sum, mut count) = (0.0, 0);
    for value in values {
        sum += value;
        count += 1;
    }
    sum / f64::from(count.max(1))
}

/// The average precision of each query of a block, by the labels of both sides; `None` where the gallery has no image of its
/// class.
fn precisions(
    cx: &Context,
    gallery: &[Tensor],
    labels: &[u32],
    queries: &Tensor,
    classes: &[u32],
) -> Result<Vec<Option<f64>>> {
    let mut found = Vec::with_capacity(classes.len());
    let some = memory::ranked_rows(labels.len());
    for rows in queries.values().chunks(some * queries.columns()) {
        let rows = cx.tensor(rows.to_vec(), rows.len() / queries.columns(), queries.columns())?;
        let mut similarities = Vec::with_capacity(gallery.len());
        for part in gallery {
            let part = LinearWeights { weight: part.clone(), bias: None, packed: None };
            similarities.push(ops::linear(cx, &mut Tape::inference(), &rows, &part, Act::None)?);
        }
        let similarities: Vec<_> = similarities.iter().map(|part| (part.values(), part.columns())).collect();
        let slots: Vec<Mutex<Option<f64>>> = (0..rows.rows()).map(|_| Mutex::default()).collect();
        let first = found.len();
        cx.pool().run(slots.len(), &|row| {
            let parts = similarities.iter().flat_map(|(values, columns)| &values[row * columns..(row + 1) * columns]);
            // A sum of zeros may be negative, which would be another similarity.
            let ranked =
                parts.map(|similarity| similarity + 0.0).zip(labels.iter().map(|label| *label == classes[first + row]));
            let precision = average_precision(ranked.collect());
            *slots[row].lock().unwrap_or_else(PoisonError::into_inner) = precision;
        });
        found.extend(slots.into_iter().map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner)));
    }
    Ok(found)
}

/// The average precision of images of which some are relevant, by their similarity; `None` where none is.
fn average_precision(mut images: Vec<(f32, bool)>) -> Option<f64> {
    images.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
    let (mut seen, mut relevant, mut sum) = (0usize, 0usize, 0.0);
    for equal in images.chunk_by(|a, b| a.0.total_cmp(&b.0).is_eq()) {
        let more = equal.iter().filter(|(_, relevant)| *relevant).count();
        seen += equal.len();
        relevant += more;
        sum += more as f64 * relevant as f64 / seen as f64;
    }
    (relevant > 0).then(|| sum / relevant as f64)
}

register!(stage "retrieval" => Retrieval, "ranks images by the similarity of features: mean average precision",
    example: "{ type: retrieval, gallery: { dataset: { type: sample, split: train } },
      queries: { dataset: { type: sample, split: test } }, student: { stage: pretrain } }");

#[cfg(test)]
mod tests {
    use std::path::Path;

    use maskalign_engine::Device;

    use super::*;
    use crate::weights::read;

    /// Average precisions that scikit-learn gives of the same features (`tests/fixtures/stages/make_retrieval.py`): some
    /// images are there twice, some classes only among the queries.
    #[test]
    fn precisions_are_those_of_scikit_learn() {
        let recorded = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/stages/retrieval.safetensors");
        let recorded = read(&recorded).unwrap();
        let labels = |name: &str| recorded[name].data.iter().map(|&label| label as u32).collect::<Vec<_>>();
        let width = recorded["gallery"].shape[1];
        for (threads, rows) in [(1, 1000), (2, 7)] {
            let cx = Context::new(Device::Cpu, threads);
            let blocks = |name: &str| -> Vec<Tensor> {
                let block = |part: &[f32]| cx.tensor(part.to_vec(), part.len() / width, width).unwrap();
                recorded[name].data.chunks(rows * width).map(block).collect()
            };
            let (gallery, labels_of_queries) = (blocks("gallery"), labels("classes"));
            let mut ours = Vec::new();
            for (queries, classes) in blocks("queries").iter().zip(labels_of_queries.chunks(rows)) {
                ours.extend(precisions(&cx, &gallery, &labels("labels"), queries, classes).unwrap());
            }
            assert_eq!(ours.len(), recorded["expected"].data.len());
            for (ours, theirs) in ours.iter().zip(&recorded["expected"].data) {
                match ours {
                    None => assert!(theirs.is_nan(), "{theirs}"),
                    Some(ours) => assert!((ours - f64::from(*theirs)).abs() < 1e-6, "{ours}, scikit-learn {theirs}"),
                }
            }
        }
    }

    /// Three of four are as near: that the relevant one is among them says as much as their share.
    #[test]
    fn ties_count_together() {
        let tied = vec![(0.5, false), (0.5, true), (0.5, false), (0.25, true)];
        assert_eq!(average_precision(tied), Some(f64::midpoint(1.0 / 3.0, 2.0 / 4.0)));
        assert_eq!(average_precision(vec![(0.5, false)]), None);
    }
}
