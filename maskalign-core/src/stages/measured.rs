//! The towers that an evaluation measures: which, at which levels, and what each gave.

use std::{borrow::Cow, sync::Arc};

use indexmap::IndexMap;
use maskalign_registry::{LevelRef, Levels, Options, Refusal, SharedOptions, Slot, StudentTag, TeacherTag, Weights};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _, ser::SerializeMap as _};
use serde_json::{Map, Value, json};

use super::{
    FeatureTap, Outcome, PlannedJudge, PlannedStage, Pooling, StageContext, StageRun, StageSummary, Tower, View,
    features::{check_levels, resolve_levels},
    keep, under,
};
use crate::{
    component,
    components::{
        students::StudentModel,
        teachers::{PlannedTeacher, TeacherBuild},
        towers::{Environment, MissingWeights, PlanContext, StudentPlan, Tap, TowerShape},
    },
    error::Result,
    events::Event,
    nn::{Init, Reach},
    plugin::Build,
    weights,
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
    /// The student of an earlier stage, as `{stage: NAME}`; or a tower whose `weights` are a run directory, an exported folder
    /// or a file, as `{type: vit, weights: PATH}`.
    #[serde(default)]
    pub student: Option<Judged>,
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

/// A student that is measured.
#[derive(Clone, Debug)]
pub(super) enum Judged {
    /// That of an earlier stage.
    Stage(String),
    /// A tower with weights of its own.
    Tower(Slot<StudentTag>),
}

impl Serialize for Judged {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Judged::Stage(stage) => {
                let mut map = serializer.serialize_map(Some(1))?;
                map.serialize_entry("stage", stage)?;
                map.end()
            }
            Judged::Tower(slot) => slot.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Judged {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let mut options = Options::deserialize(deserializer)?;
        let name = options.shift_remove("type");
        match (name, options.get("stage")) {
            (Some(Value::String(name)), _) => Ok(Judged::Tower(Slot::with(name, options))),
            (None, Some(Value::String(stage))) if options.len() == 1 => Ok(Judged::Stage(stage.clone())),
            _ => Err(D::Error::custom(format!("expected {FORMS}"))),
        }
    }
}

/// What may be said of a student that is judged.
const FORMS: &str = "`{stage: NAME}`, or a student as `{type: vit, weights: PATH}`";

impl JsonSchema for Judged {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Judged".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let stage = "The earlier stage that is meant.";
        json_schema!({
            "anyOf": [
                { "$ref": "#/definitions/student" },
                {
                    "type": "object",
                    "properties": { "stage": { "type": "string", "x-reference": "stage", "description": stage } },
                    "required": ["stage"],
                    "additionalProperties": false,
                },
            ],
            "x-expected": FORMS,
        })
    }
}

/// Towers that are measured and fit.
pub(super) struct PlannedTowers {
    student: Option<MeasuredStudent>,
    baselines: Vec<Baseline>,
    teachers: Vec<MeasuredTeacher>,
    view: View,
}

/// A student that is measured, by the stage that leaves it or with weights of its own.
struct MeasuredStudent {
    stage: Option<String>,
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
    /// Plans the towers for images of `size` pixels, or `trained`, a student in training, in place of any. Every refusal is
    /// noted; `None` where there is one.
    pub(super) fn plan(
        &self,
        cx: &StageContext,
        trained: Option<&StudentPlan>,
        size: usize,
        refusals: &mut Vec<Refusal>,
    ) -> Option<PlannedTowers> {
        let towers = cx.towers(size);
        if let Some(trained) = trained {
            return self.plan_trained(trained, refusals);
        }
        let student = self.student.as_ref().and_then(|student| {
            let planned = student.plan(&towers, cx.name).map_err(|refusal| refusal.under("student"));
            keep(refusals, planned)
        });
        if self.baselines.contains(&Baseline::Untrained) {
            let missing = match &self.student {
                None => Some("`untrained` is a student before training, but `student` is missing"),
                Some(Judged::Stage(_)) => None,
                Some(Judged::Tower(_)) => Some("`untrained` is the student of an earlier stage before its training"),
            };
            refusals.extend(missing.map(|message| Refusal::new("baselines", message)));
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

    /// Plans to measure a student in training alone.
    fn plan_trained(&self, trained: &StudentPlan, refusals: &mut Vec<Refusal>) -> Option<PlannedTowers> {
        let given = [
            ("student", self.student.is_some()),
            ("baselines", !self.baselines.is_empty()),
            ("teachers", !self.teachers.is_empty()),
        ];
        for (option, _) in given.into_iter().filter(|(_, is_given)| *is_given) {
            let refusal =
                Refusal::new(option, "in the course of training, the student that is trained is judged alone");
            refusals.push(refusal.help("leave this out, or judge in a stage of its own after the training"));
        }
        keep(refusals, check_levels(self.levels.as_ref(), self.pooling));
        let (shape, blocks) = (trained.shape(), trained.reach.blocks);
        let levels = self.check_tower("the student", &shape, blocks, refusals);
        let student = MeasuredStudent { stage: None, plan: trained.clone(), levels };
        let view = View { pooling: self.pooling, tap: self.tap, batch: self.batch };
        let planned = PlannedTowers { student: Some(student), baselines: Vec::new(), teachers: Vec::new(), view };
        refusals.is_empty().then_some(planned)
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

impl Judged {
    fn plan(&self, towers: &PlanContext, name: &str) -> Result<MeasuredStudent, Refusal> {
        let slot = match self {
            Judged::Stage(stage) => {
                let plan = towers.student(stage)?.clone();
                return Ok(MeasuredStudent { stage: Some(stage.clone()), plan, levels: None });
            }
            Judged::Tower(slot) => slot,
        };
        let tower = Build::build(slot)?.plan(towers)?;
        if tower.is_drawn() && towers.missing_weights == MissingWeights::Refused {
            return Err(Refusal::new(
                "weights",
                "a student without weights has random values: nothing is learnt of it",
            )
            .help(
                "name a run directory, an exported folder or a file; `{stage: NAME}` is an earlier stage's student",
            ));
        }
        let depth = tower.shape().arch.depth;
        let blocks = trained_blocks(slot, towers).unwrap_or(depth).min(depth);
        let plan = StudentPlan { tower, reach: Reach { blocks, norm: true, qkv: false }, init_scope: name.to_owned() };
        Ok(MeasuredStudent { stage: None, plan, levels: None })
    }
}

/// The blocks that training reached of a student whose weights note it.
fn trained_blocks(slot: &Slot<StudentTag>, towers: &PlanContext) -> Option<usize> {
    let weights: Weights = serde_json::from_value(slot.options.get("weights")?.clone()).ok()?;
    match &weights {
        Weights::Stage(stage) => towers.student(stage).ok().map(|student| student.reach.blocks),
        _ if towers.environment == Environment::Ignored => None,
        weights => {
            let path = weights::locate(&weights.file()?.0.to_string()).ok()?;
            Some(weights::describe(&path).ok()?.trained_blocks?.value)
        }
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

    /// Measures a student in training: the result, by level where levels are asked for.
    fn judge(&self, run: &mut StageRun, student: &dyn StudentModel, measures: &dyn Measures) -> Result<Value> {
        let levels = self.student.as_ref().and_then(|student| student.levels.as_deref());
        let measured = measures.measure(run, &Tower::Student(student), self.view, levels, None)?;
        Ok(match levels {
            None => measured.into_iter().next().unwrap_or_default(),
            Some(levels) => levels.iter().map(ToString::to_string).zip(measured).collect(),
        })
    }

    /// Builds one tower after another and measures it. Each result is told of as one of its own as soon as it is there; all
    /// of them by tower, and by level where levels are asked for, are what this gives. Pictures show the student, or else
    /// the first teacher, or else the pixels.
    fn measure(&self, run: &mut StageRun, measures: &dyn Measures) -> Result<Value> {
        let mut results = Map::new();
        let mut tower = |run: &mut StageRun,
                         name: &str,
                         tower: &Tower,
                         levels: Option<&[LevelRef]>,
                         shown: Option<&str>|
         -> Result<()> {
            let shown = shown.filter(|_| run.events.take_pictures());
            let measured = measures.measure(run, tower, self.view, levels, shown)?;
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
            let alone = self.student.is_none() && self.teachers.is_empty();
            tower(run, "pixels", &Tower::Pixels, None, alone.then_some("the pixels"))?;
        }
        if let Some(MeasuredStudent { stage, plan, levels }) = &self.student {
            let init = Init::new(run.cx.device(), run.seed, &*plan.init_scope);
            // It runs at the size it was trained at, and resizes these images to that.
            let mut model = plan.tower.build(&init, run.trained).map_err(|e| under(e, "student"))?;
            model.set_reach(plan.reach);
            if self.baselines.contains(&Baseline::Untrained) {
                tower(run, "untrained", &Tower::Student(&*model), levels.as_deref(), None)?;
            }
            if let Some(stage) = stage {
                model.load(run.trained.get(stage)?)?;
            }
            tower(run, "student", &Tower::Student(&*model), levels.as_deref(), Some("the student"))?;
        }
        for (at, MeasuredTeacher { name, plan, levels }) in self.teachers.iter().enumerate() {
            let mut build = TeacherBuild { cx: run.cx, trained: run.trained, student: None };
            let teacher = plan.build(&mut build).map_err(|e| under(under(e, name), "teachers"))?;
            let shown = (self.student.is_none() && at == 0).then(|| format!("teacher `{name}`"));
            tower(run, name, &Tower::Teacher(&*teacher), levels.as_deref(), shown.as_deref())?;
        }
        Ok(Value::Object(results))
    }
}

/// What is measured of a tower, the same of the towers of a stage and of a student in training.
pub(super) trait Measures {
    /// What is known of it.
    fn summary(&self) -> &StageSummary;
    /// The towers.
    fn towers(&self) -> &PlannedTowers;
    /// The results of a tower at some levels, or at the last. The last is shown in pictures where the tower has a name for
    /// them.
    fn measure(
        &self,
        run: &mut StageRun,
        tower: &Tower,
        view: View,
        levels: Option<&[LevelRef]>,
        shown: Option<&str>,
    ) -> Result<Vec<Value>>;
}

/// Measures as a stage of their own, or in the course of one that trains.
pub(super) struct Measuring<M>(pub M);

impl<M: Measures> PlannedStage for Measuring<M> {
    fn summary(&self) -> &StageSummary {
        self.0.summary()
    }

    fn run(&self, mut run: StageRun) -> Result<Outcome> {
        let results = self.0.towers().measure(&mut run, &self.0)?;
        Ok(Outcome { results, student: None })
    }
}

impl<M: Measures> PlannedJudge for Measuring<M> {
    fn summary(&self) -> &StageSummary {
        self.0.summary()
    }

    fn judge(&self, run: &mut StageRun, student: &dyn StudentModel) -> Result<Value> {
        self.0.towers().judge(run, student, &self.0)
    }
}
