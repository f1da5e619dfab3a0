//! One term of the loss: what is compared with what, and by which distance.

use std::{collections::BTreeMap, sync::Arc};

use maskalign_engine::Result;
use maskalign_registry::{AlignerTag, LevelRef, LossTag, Refusal, Scalar as Ramp, Slot, TargetTag};

use crate::{
    component,
    components::{
        aligners::{AlignPlan, PlannedAligner},
        losses::Loss,
        maskers::Counts,
        students::PlannedStudent,
        targets::{PlannedTarget, TargetContext},
        teachers::PlannedTeacher,
        tokens::{TokenKind, Tokens},
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
}

impl PlannedObjective {
    /// Values of an image that are compared with targets.
    pub fn compared(&self, counts: Counts) -> usize {
        let heads = self.target.relations().map_or(1, |relations| relations.heads);
        self.tokens.count(counts.visible, counts.masked) * heads * self.target.width * self.level_weights.len()
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

impl Objective {
    /// Refuses parts that do not fit each other: every refusal, not the first. `counts` are absent where the masker was
    /// refused; what depends on them is left out then, and there may be no objective although nothing is refused here.
    pub(super) fn plan(
        &self,
        name: &str,
        student: TowerShape,
        teachers: &BTreeMap<String, TowerShape>,
        counts: Option<Counts>,
        blocks: usize,
    ) -> Result<Option<PlannedObjective>, Vec<Refusal>> {
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
        let (Some(tokens), Some(target), Some(weights), Some(aligner), Some(loss), Some(counts), true) =
            (tokens, target, weights, aligner, loss, counts, refusals.is_empty())
        else {
            return if refusals.is_empty() { Ok(None) } else { Err(refusals) };
        };
        let wanted: Vec<usize> = (0..target.outputs).filter(|&i| weights[i] > 0.0).collect();
        let align = AlignPlan {
            student,
            counts,
            blocks,
            tokens,
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
        let relates = aligner.relates();
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
        let aligner = aligner.plan(&align).map_err(|r| vec![r.under("aligner")])?;
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
            aligner: aligner.into(),
            relates,
            loss: loss.into(),
            weight: self.weight,
            level_weights: wanted.iter().map(|&i| weights[i] as f32).collect(),
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
