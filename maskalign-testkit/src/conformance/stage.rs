//! Stages: what is known before the first step.

use std::collections::BTreeMap;

use maskalign_registry::StageTag;

use super::{Faults, built};
use maskalign_core::{
    components::towers::{Environment, MissingWeights},
    stages::{StageContext, StageSummary},
};

pub(super) fn check(text: &str, faults: &mut Faults) {
    let Some(stage) = built::<StageTag>(text, faults) else { return };
    let students = BTreeMap::new();
    let cx = StageContext {
        name: "example",
        seed: 0,
        students: &students,
        environment: Environment::Ignored,
        missing_weights: MissingWeights::Random,
        recompute: maskalign_engine::Recompute::Never,
    };
    let plans = [stage.plan(&cx), stage.plan(&cx)].map(|plan| {
        plan.map_err(|refusals| refusals.iter().map(|refusal| refusal.to_string()).collect::<Vec<_>>().join("; "))
    });
    let [first, again] = plans.map(|plan| faults.expect("planning its example", plan));
    let (Some(first), Some(again)) = (first, again) else { return };
    let (first, again) = (first.summary(), again.summary());
    faults.unless(first.memory > 0, "it plans no memory");
    faults.unless(first.trainable <= first.parameters, "it trains more parameters than it has");
    let known = |plan: &StageSummary| (plan.images, plan.parameters, plan.trainable, plan.steps, plan.memory);
    faults.unless(known(first) == known(again), "it plans differently the second time");
}
