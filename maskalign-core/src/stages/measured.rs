//! The towers that an evaluation measures: which, at which levels, and what each gave.

use std::sync::Arc;

use indexmap::IndexMap;
use maskalign_registry::{LevelRef, Levels, Refusal, SharedOptions, Slot, TeacherTag, Weights};
use serde_json::{Map, Value, json};

use super::{
    FeatureTap, Pooling, StageContext, StageRun, Tower, View,
    features::{check_levels, resolve_levels},
    keep, under,
};
use crate::{
    component,
    components::{
        teachers::{PlannedTeacher, TeacherBuild},
        towers::{StudentPlan, Tap, TowerShape},
    },
    error::Result,
    events::Event,
    nn::Init,
    plugin::Build,
};

/// What a student is compared with.
#[component]
#[derive(Copy, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub(super) enum Baseline {
    /// The raw pixels.
    Pixels,
    /// The student before training.
    Untrained,
}

pub(super) fn batch() -> usize {
    64
}

/// The towers that are measured, and how their features are taken.
#[component]
pub(super) struct MeasuredTowers {
    /// The student of an earlier stage, as `{stage: NAME}`.
    #[serde(default)]
    pub student: Option<Weights>,
    /// What the student is compared with.
    #[serde(default)]
    pub baselines: Vec<Baseline>,
    /// Towers that are measured too, by name.
    #[serde(default)]
    pub teachers: IndexMap<String, Slot<TeacherTag>>,
    /// How a tower's tokens become one feature.
    #[serde(default)]
    pub pooling: Pooling,
    /// Where a tower's tokens are taken: after its last block that was trained, or after the final norm too, as DINO's
    /// own evaluation does (with `pooling: cls`). Pre-training may leave a student's final norm at its initial scale.
    #[serde(default)]
    pub tap: FeatureTap,
    /// Levels of each tower that are measured, all in one pass over the images: `all`, `{last: K}`, or a list of 0-based
    /// blocks, negative from the end, and `embed`. Absent: the last block that was trained.
    #[serde(default)]
    pub levels: Option<Levels>,
    /// Images that go through a tower together.
    #[serde(default = "batch")]
    #[schemars(range(min = 1, max = 1048576))]
    pub batch: usize,
}

impl SharedOptions for MeasuredTowers {
    const LAST: &'static [&'static str] = &["student", "baselines", "teachers", "pooling", "tap", "levels", "batch"];
}

/// Towers that are measured and fit.
pub(super) struct PlannedTowers {
    student: Option<MeasuredStudent>,
    baselines: Vec<Baseline>,
    teachers: Vec<MeasuredTeacher>,
    view: View,
}

/// A student that is measured, by the stage that leaves it.
struct MeasuredStudent {
    stage: String,
    plan: StudentPlan,
    levels: Option<Vec<LevelRef>>,
}

/// A teacher that is measured, by its name.
struct MeasuredTeacher {
    name: String,
    plan: Arc<dyn PlannedTeacher>,
    levels: Option<Vec<LevelRef>>,
}

impl MeasuredTowers {
    /// Plans the towers for images of `size` pixels. Every refusal is noted; `None` where there is one.
    pub(super) fn plan(&self, cx: &StageContext, size: usize, refusals: &mut Vec<Refusal>) -> Option<PlannedTowers> {
        let towers = cx.towers(size);
        let student = keep(refusals, self.stage()).flatten().and_then(|stage| {
            let planned = towers.student(stage).map_err(|r| r.under("student"));
            let plan = keep(refusals, planned)?.clone();
            Some(MeasuredStudent { stage: stage.to_string(), plan, levels: None })
        });
        if self.student.is_none() && self.baselines.contains(&Baseline::Untrained) {
            refusals
                .push(Refusal::new("baselines", "`untrained` is a student before training, but `student` is missing"));
        }
        let no_tower = self.student.is_none() && self.teachers.is_empty();
        if no_tower && self.baselines.is_empty() {
            refusals.push(
                Refusal::whole("nothing is measured").help("give a `student`, `teachers`, or `baselines: [pixels]`"),
            );
        } else if no_tower && self.levels.is_some() {
            refusals.push(Refusal::new("levels", "pixels have no levels, and no tower is measured"));
        }
        keep(refusals, check_levels(self.levels.as_ref(), self.pooling));
        if !refusals.is_empty() {
            return None;
        }
        let student = student.map(|student| {
            let (shape, blocks) = (student.plan.shape(), student.plan.reach.blocks);
            let levels = self.check_tower("the student", &shape, blocks, refusals);
            MeasuredStudent { levels, ..student }
        });
        let mut teachers = Vec::new();
        for (name, slot) in &self.teachers {
            let planned = Build::build(slot).and_then(|t| t.plan(&towers));
            let Some(plan) = keep(refusals, planned.map_err(|r| r.under(name).under("teachers"))) else { continue };
            let (whose, shape) = (format!("teacher `{name}`"), plan.shape());
            let levels = self.check_tower(&whose, &shape, shape.arch.depth, refusals);
            teachers.push(MeasuredTeacher { name: name.clone(), plan: plan.into(), levels });
        }
        let view = View { pooling: self.pooling, tap: self.tap, batch: self.batch };
        let planned = PlannedTowers { student, baselines: self.baselines.clone(), teachers, view };
        refusals.is_empty().then_some(planned)
    }

    fn stage(&self) -> Result<Option<&str>, Refusal> {
        match &self.student {
            None => Ok(None),
            Some(Weights::Stage(stage)) => Ok(Some(stage)),
            Some(_) => Err(Refusal::new("student", "expected the student of an earlier stage, as `{stage: NAME}`")
                .help("a tower from a file goes under `teachers`")),
        }
    }

    /// Refuses what no feature of a tower of this name can be taken by, and gives the levels.
    fn check_tower(
        &self,
        whose: &str,
        shape: &TowerShape,
        blocks: usize,
        refusals: &mut Vec<Refusal>,
    ) -> Option<Vec<LevelRef>> {
        keep(refusals, self.pooling.check(whose, shape));
        if self.tap == FeatureTap::Norm {
            keep(refusals, shape.check_tap(whose, Tap::Norm));
        }
        keep(refusals, resolve_levels(self.levels.as_ref(), whose, shape, blocks)).flatten()
    }
}

impl PlannedTowers {
    /// Each tower's shape with the number of its levels that are measured in one pass.
    pub(super) fn shapes(&self) -> Vec<(TowerShape, usize)> {
        let count = |levels: &Option<Vec<LevelRef>>| levels.as_ref().map_or(1, Vec::len);
        let student = self.student.iter().map(|student| (student.plan.shape(), count(&student.levels)));
        student.chain(self.teachers.iter().map(|teacher| (teacher.plan.shape(), count(&teacher.levels)))).collect()
    }

    /// Whether pixels are measured too.
    pub(super) fn pixels(&self) -> bool {
        self.baselines.contains(&Baseline::Pixels)
    }

    /// Of the towers in the order in which they are measured, the one that pictures are made of, and what it is called: the
    /// student, or else the first teacher, or else the pixels.
    pub(super) fn shown(&self) -> (usize, String) {
        let before = usize::from(self.pixels());
        match (&self.student, self.teachers.first()) {
            (Some(_), _) => {
                let untrained = self.baselines.contains(&Baseline::Untrained);
                (before + usize::from(untrained), "the student".to_owned())
            }
            (None, Some(teacher)) => (before, format!("teacher `{}`", teacher.name)),
            (None, None) => (0, "the pixels".to_owned()),
        }
    }

    /// Builds one tower after another and measures it: `measure` gives the result of each level, or of the last alone.
    /// Each is told of as a result of its own as soon as it is there; all of them by tower, and by level where levels are
    /// asked for, are what this gives.
    pub(super) fn measure(&self, run: &mut StageRun, measure: Measure) -> Result<Value> {
        let mut results = Map::new();
        let mut tower = |run: &mut StageRun, name: &str, tower: &Tower, levels: Option<&[LevelRef]>| -> Result<()> {
            let measured = measure(run, tower, self.view, levels)?;
            let mut by_level = Map::new();
            for (place, result) in measured.into_iter().enumerate() {
                let Some(level) = levels.map(|levels| levels[place].to_string()) else {
                    run.events.send(Event::Result { stage: run.name, result: &json!({ name: result }) })?;
                    results.insert(name.to_string(), result);
                    return Ok(());
                };
                let row = json!({ name: { level.as_str(): result } });
                run.events.send(Event::Result { stage: run.name, result: &row })?;
                by_level.insert(level, result);
            }
            results.insert(name.to_string(), Value::Object(by_level));
            Ok(())
        };
        if self.pixels() {
            tower(run, "pixels", &Tower::Pixels, None)?;
        }
        if let Some(MeasuredStudent { stage, plan, levels }) = &self.student {
            let init = Init::new(run.cx.device(), run.seed, &*plan.init_scope);
            // It runs at the size it was trained at, and resizes these images to that.
            let mut model = plan.tower.build(&init, run.trained).map_err(|e| under(e, "student"))?;
            model.set_reach(plan.reach);
            if self.baselines.contains(&Baseline::Untrained) {
                tower(run, "untrained", &Tower::Student(&*model), levels.as_deref())?;
            }
            model.load(run.trained.get(stage)?)?;
            tower(run, "student", &Tower::Student(&*model), levels.as_deref())?;
        }
        for MeasuredTeacher { name, plan, levels } in &self.teachers {
            let mut build = TeacherBuild { cx: run.cx, trained: run.trained, student: None };
            let teacher = plan.build(&mut build).map_err(|e| under(under(e, name), "teachers"))?;
            tower(run, name, &Tower::Teacher(&*teacher), levels.as_deref())?;
        }
        Ok(Value::Object(results))
    }
}

/// Measures a tower at some levels, or at the last.
pub(super) type Measure<'m> = &'m mut dyn FnMut(&mut StageRun, &Tower, View, Option<&[LevelRef]>) -> Result<Vec<Value>>;
