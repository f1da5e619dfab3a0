//! One term of the loss: what is compared with what, and by which distance.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use maskalign_engine::Result;
use maskalign_registry::{AlignerTag, LevelRef, LossTag, Refusal, Scalar as Ramp, Slot, TargetTag};

use super::views::{Compared, ComparedViews, SeenCrop};
use crate::{
    component,
    components::{
        aligners::{AlignPlan, PlannedAligner},
        losses::Loss,
        maskers::Counts,
        students::PlannedStudent,
        targets::{PlannedTarget, TargetContext},
        teachers::PlannedTeacher,
        tokens::{Masks, TokenKind, Tokens},
        towers::TowerShape,
    },
    plugin::Build,
    stages::keep,
};

/// The weights of an objective's levels.
#[derive(Clone, Debug, Default, PartialEq)]
enum LevelWeights {
    /// All equal, summing to 1.
    #[default]
    Uniform,
    /// i / sum of i, from 0: the first takes no part (the official `linear_decay`).
    Linear,
    /// As given.
    List(Vec<f64>),
}

impl LevelWeights {
    fn resolve(&self, levels: usize) -> Result<Vec<f64>, Refusal> {
        match self {
            LevelWeights::Uniform => Ok(vec![1.0 / levels as f64; levels]),
            LevelWeights::Linear if levels == 1 => {
                Err(Refusal::new("level_weights", "`linear` gives the only level the weight 0"))
            }
            LevelWeights::Linear => {
                let sum = (levels * (levels - 1) / 2) as f64;
                Ok((0..levels).map(|i| i as f64 / sum).collect())
            }
            LevelWeights::List(list) if list.len() != levels => {
                Err(Refusal::new("level_weights", format!("{} weights for {levels} levels", list.len())))
            }
            LevelWeights::List(list) if list.iter().all(|&w| w == 0.0) => {
                Err(Refusal::new("level_weights", "every level has the weight 0"))
            }
            LevelWeights::List(list) => Ok(list.clone()),
        }
    }
}

impl serde::Serialize for LevelWeights {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            LevelWeights::Uniform => s.serialize_str("uniform"),
            LevelWeights::Linear => s.serialize_str("linear"),
            LevelWeights::List(list) => list.serialize(s),
        }
    }
}

impl<'de> serde::Deserialize<'de> for LevelWeights {
    fn deserialize<De: serde::Deserializer<'de>>(d: De) -> Result<Self, De::Error> {
        use serde::de::Error;
        match serde_json::Value::deserialize(d)? {
            serde_json::Value::String(name) if name == "uniform" => Ok(LevelWeights::Uniform),
            serde_json::Value::String(name) if name == "linear" => Ok(LevelWeights::Linear),
            list => serde_json::from_value(list).map(LevelWeights::List).map_err(De::Error::custom),
        }
    }
}

impl schemars::JsonSchema for LevelWeights {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "LevelWeights".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "x-expected": "`uniform`, `linear`, or a list of numbers",
            "anyOf": [
                { "type": "string", "enum": ["uniform", "linear"] },
                { "type": "array", "items": { "type": "number", "minimum": 0 }, "minItems": 1 },
            ],
        })
    }
}

fn unit_weight() -> Ramp {
    Ramp::Constant(1.0)
}

/// One term of the loss.
#[component]
pub struct Objective {
    /// What the student is to match.
    target: Slot<TargetTag>,
    /// The tokens that are compared.
    #[schemars(length(min = 1))]
    tokens: Vec<TokenKind>,
    /// The map from the student's outputs to the target's shape.
    aligner: Slot<AlignerTag>,
    /// The distance between the two.
    loss: Slot<LossTag>,
    /// Weights of the target's levels: `uniform`, `linear`, or a list. A level of weight 0 takes no part: no gradient,
    /// no update, no decay of its head.
    #[serde(default)]
    level_weights: LevelWeights,
    /// Weight of the objective.
    #[serde(default = "unit_weight")]
    weight: Ramp,
    /// Which views of an image are compared, where the data has several. Absent: each with itself.
    #[serde(default)]
    views: Option<ComparedViews>,
}

/// An objective whose parts fit each other.
#[derive(Clone)]
pub struct PlannedObjective {
    /// Its name in the recipe.
    pub name: String,
    /// The tokens that are compared.
    pub tokens: Tokens,
    /// What the student is to match.
    pub target: Arc<PlannedTarget>,
    /// The levels of the target's tower that are computed, in order.
    pub levels: Vec<usize>,
    /// The map from the student's outputs to the target's shape.
    pub aligner: Arc<dyn PlannedAligner>,
    /// Whether that map is given queries, keys and values of blocks in place of their outputs.
    pub relates: bool,
    /// The distance between the two.
    pub loss: Arc<dyn Loss>,
    /// Weight of the objective.
    pub weight: Ramp,
    /// Weights of the outputs that are compared.
    pub level_weights: Vec<f32>,
    /// The objective whose map it is, where that is another's.
    pub shares: Option<String>,
    /// Which crops are compared.
    pub(super) compared: Compared,
}

impl PlannedObjective {
    /// Values of an image that are compared with targets.
    pub fn compared(&self, counts: Counts) -> usize {
        let each = self.tokens.count(counts.visible, counts.masked) * self.target.width * self.level_weights.len();
        each * self.heads() * self.compared.pairs.len()
    }

    /// Rows of a token: one, or one for each head of relations.
    fn heads(&self) -> usize {
        self.target.relations().map_or(1, |relations| relations.heads)
    }

    /// How many rows of each image are compared.
    pub(super) fn lengths(&self, masks: &Masks) -> Vec<usize> {
        masks.lengths(self.tokens).into_iter().map(|tokens| tokens * self.heads()).collect()
    }

    /// The blocks of the student that it reads.
    pub(super) fn student_blocks(&self) -> impl Iterator<Item = usize> {
        self.aligner.needs().levels.iter().filter_map(|level| match level {
            LevelRef::Block(block) => Some(*block),
            LevelRef::Embed => None,
        })
    }

    /// The deepest of the student's layers that it reads: 0 is the embedding of patches, 1 the first block.
    pub(super) fn deepest_layer(&self) -> usize {
        self.student_blocks().max().map_or(0, |block| block + 1)
    }

    /// Refuses towers that do not give what relations are of.
    pub(super) fn check_qkv(
        &self,
        student: &dyn PlannedStudent,
        teachers: &BTreeMap<String, Arc<dyn PlannedTeacher>>,
    ) -> Result<(), Refusal> {
        let name = self.target.teacher().filter(|_| self.target.relations().is_some());
        if let Some(name) = name.filter(|name| teachers.get(*name).is_some_and(|teacher| !teacher.gives_qkv())) {
            let message = format!("`{name}` does not give queries, keys and values of its blocks");
            return Err(Refusal::new("teacher", message).under("target"));
        }
        if self.relates && !student.gives_qkv() {
            return Err(Refusal::new("aligner", "the student does not give queries, keys and values of its blocks")
                .in_stage(["student"], "the student"));
        }
        Ok(())
    }
}

/// What an objective is planned beside.
pub(super) struct Beside<'a> {
    /// The student.
    pub student: TowerShape,
    /// The teachers' shapes, by name.
    pub teachers: &'a BTreeMap<String, TowerShape>,
    /// Absent where the masker was refused.
    pub counts: Option<Counts>,
    /// In how many blocks predicted patches come.
    pub blocks: usize,
    /// The crops of an image; absent where they were refused.
    pub crops: Option<&'a [SeenCrop]>,
    /// Side in pixels of the first view.
    pub size: usize,
    /// Whether images of a micro-batch have different masks in number.
    pub is_uneven: bool,
    /// Tokens that other objectives compare through this one's map.
    pub others: Tokens,
    /// The objectives that are planned already, by name: those whose maps are their own.
    pub planned: &'a BTreeMap<String, PlannedObjective>,
    /// The names of all whose maps are their own, those that were refused among them.
    pub owners: &'a BTreeSet<&'a str>,
}

impl Objective {
    /// The objective whose map it shares, and the tokens that it compares.
    pub(super) fn shares(&self) -> Option<(String, Tokens)> {
        let aligner = Build::build(&self.aligner).ok()?;
        Some((aligner.shares()?.to_owned(), Tokens::from_list(&self.tokens).ok()?))
    }

    /// Refuses parts that do not fit each other: every refusal, not the first. What depends on parts of `beside` that were
    /// refused is left out, and there may be no objective although nothing is refused here.
    pub(super) fn plan(&self, name: &str, beside: &Beside) -> Result<Option<PlannedObjective>, Vec<Refusal>> {
        let Beside { student, teachers, counts, blocks, .. } = *beside;
        let mut refusals = Vec::new();
        keep(&mut refusals, self.check_weight());
        let tokens = keep(&mut refusals, Tokens::from_list(&self.tokens));
        if tokens.is_some_and(|tokens| tokens.masked) && counts.is_some_and(|counts| counts.masked == 0) {
            refusals.push(
                Refusal::new("tokens", "`masked` names no patch: nothing is masked")
                    .help("give the stage a `masker`, or raise its ratio"),
            );
        }
        // Where the masker was refused, nothing is built of what is planned here.
        let all = Counts { visible: student.grid.patches(), masked: 0 };
        let at = TargetContext { student, teachers, tokens: tokens.unwrap_or_default(), counts: counts.unwrap_or(all) };
        let target = Build::build(&self.target).and_then(|target| target.plan(&at));
        let target = keep(&mut refusals, target.map_err(|r| r.under("target")));
        let weights = target.as_ref().and_then(|t| keep(&mut refusals, self.level_weights.resolve(t.outputs)));
        let aligner = keep(&mut refusals, Build::build(&self.aligner).map_err(|r| r.under("aligner")));
        let loss = keep(&mut refusals, Build::build(&self.loss).map_err(|r| r.under("loss")));
        let compared = beside.crops.zip(tokens).and_then(|(crops, tokens)| {
            keep(&mut refusals, ComparedViews::plan(self.views.as_ref(), crops, beside.size, tokens))
        });
        let (Some(tokens), Some(target), Some(weights), Some(aligner), Some(loss), Some(counts), Some(compared), true) =
            (tokens, target, weights, aligner, loss, counts, compared, refusals.is_empty())
        else {
            return if refusals.is_empty() { Ok(None) } else { Err(refusals) };
        };
        let wanted: Vec<usize> = (0..target.outputs).filter(|&i| weights[i] > 0.0).collect();
        let align = AlignPlan {
            student,
            counts,
            blocks,
            tokens: tokens.union(beside.others),
            target_depth: target.depth,
            target_levels: target.levels.clone(),
            outputs: target.outputs,
            wanted: wanted.clone(),
            width: target.width,
            relations: target.relations().cloned(),
        };
        if target.relations().is_some() && wanted.len() < target.outputs {
            let message = "a relation has the weight 0";
            let refusal = Refusal::new("level_weights", message).beside(["target", "of"], "the relations");
            return Err(vec![refusal.help("leave it out of `of`")]);
        }
        if target.relations().is_some() && beside.is_uneven {
            let message = "relations are of equally many tokens in each image";
            let refusal = Refusal::new("target", message).in_stage(["masker"], "this one leaves different numbers");
            return Err(vec![refusal.help("choose a masker that masks equally many")]);
        }
        let shares = aligner.shares().map(str::to_owned);
        let owner = shares.as_ref().and_then(|other| beside.planned.get(other));
        if shares.as_ref().is_some_and(|other| owner.is_none() && beside.owners.contains(other.as_str())) {
            // It was refused itself.
            return Ok(None);
        }
        let relates = owner.map_or(aligner.relates(), |owner| owner.relates);
        match (target.relations().is_some(), relates) {
            (true, false) => {
                let refusal = Refusal::new("aligner", "the target is of relations, which this aligner does not give")
                    .related(["target"], "relations are asked for here");
                return Err(vec![refusal.help("use the aligner `relations`, or another target")]);
            }
            (false, true) => {
                let refusal = Refusal::new("aligner", "there are no relations to match")
                    .related(["target"], "this target is none of relations");
                return Err(vec![refusal.help("use the target `relations`, or another aligner")]);
            }
            _ => {}
        }
        let aligner: Arc<dyn PlannedAligner> = match &shares {
            None => aligner.plan(&align).map_err(|r| vec![r.under("aligner")])?.into(),
            Some(other) => match beside.planned.get(other) {
                None => {
                    let known: Vec<&str> = beside.owners.iter().copied().collect();
                    let text = format!("no objective `{other}` has a map of its own");
                    let refusal = Refusal::new("objective", text).under("aligner");
                    return Err(vec![refusal.help(match known.is_empty() {
                        true => "none has one: give one of them an aligner of another type".to_owned(),
                        false => format!("those that have one: {}", known.join(", ")),
                    })]);
                }
                Some(owner) if owner.target.width != target.width || owner.level_weights.len() != wanted.len() => {
                    let text = format!(
                        "the target has {} of {} channels, that of `{other}` {} of {}",
                        wanted.len(),
                        target.width,
                        owner.level_weights.len(),
                        owner.target.width
                    );
                    return Err(vec![Refusal::whole(text).under("aligner").beside(["target"], "the target")]);
                }
                Some(owner) => Arc::clone(&owner.aligner),
            },
        };
        // A level of weight 0 is neither computed nor compared.
        let levels = match target.outputs == target.levels.len() {
            true => wanted.iter().map(|&i| target.levels[i]).collect(),
            false => target.levels.clone(),
        };
        Ok(Some(PlannedObjective {
            name: name.to_string(),
            tokens,
            target: Arc::new(target),
            levels,
            aligner,
            relates,
            loss: loss.into(),
            weight: self.weight,
            level_weights: wanted.iter().map(|&i| weights[i] as f32).collect(),
            shares,
            compared,
        }))
    }

    fn check_weight(&self) -> Result<(), Refusal> {
        let (least, most) = self.weight.bounds();
        if least < 0.0 || most == 0.0 {
            let message = format!("expected a weight above 0, found {}", self.weight);
            return Err(Refusal::new("weight", message).help("to leave an objective out, remove it"));
        }
        Ok(())
    }
}
