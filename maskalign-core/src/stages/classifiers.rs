//! Classifiers with weights of their own: a tower, and the head that stands beside it or in another file.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use maskalign_engine::{Context, ImageBatch, Role, Tape, Tensor, ops::Act};
use maskalign_registry::{Refusal, Slot, StudentTag, Weights, source::parse_value};
use serde_json::Value;

use super::{Classify, FeatureTap, Pooling, Tower, View, linear_probe, under};
use crate::{
    component,
    components::{
        students::{PlannedStudent, StudentModel},
        towers::{Environment, MissingWeights, PlanContext, Tap, TowerShape, TrainedStudents},
    },
    error::Result,
    nn::{BatchNorm, Bias, Init, Linear, Norm, Reach},
    plugin::Build,
    run::RunDir,
    weights::{self, CheckpointHeader, Family, Head, WeightsError},
};

/// What classifies behind a tower with weights of its own.
#[component]
#[derive(Default)]
pub(super) struct HeadOptions {
    /// Weights that hold it: a run directory of a linear probe, or a file. Absent: those of the tower; or else the linear
    /// probe of it in the same run.
    #[serde(default)]
    pub weights: Option<Weights>,
    /// What it reads. Absent: what a linear probe of a run read, by the run's recipe. Of other weights: the mean where they
    /// have a norm of averaged tokens (`fc_norm`), where a configuration beside them says so, and where the tower has no
    /// class token; else the class token.
    #[serde(default)]
    pub pooling: Option<Pooling>,
    /// Where tokens are taken. Absent: as for `pooling`; of other weights after the final norm, but for a norm of averaged
    /// tokens, which stands in its place.
    #[serde(default)]
    pub tap: Option<FeatureTap>,
}

/// A classifier whose tower and head fit.
pub(super) struct PlannedHeld {
    tower: Arc<dyn PlannedStudent>,
    /// `None` where files are not looked at.
    head: Option<Head>,
    view: View,
    scope: String,
}

impl PlannedHeld {
    /// Plans a tower with weights of its own and finds its head. `batch` images go through it together.
    ///
    /// # Errors
    /// Names `classifier` or `head`.
    pub(super) fn plan(
        slot: &Slot<StudentTag>,
        options: &HeadOptions,
        towers: &PlanContext,
        scope: &str,
        batch: usize,
    ) -> Result<PlannedHeld, Refusal> {
        let of_tower = |refusal: Refusal| refusal.under("classifier");
        let tower = Build::build(slot).and_then(|student| student.plan(towers)).map_err(of_tower)?;
        let shape = tower.shape();
        if tower.is_drawn() && towers.missing_weights == MissingWeights::Refused {
            let refusal = Refusal::new("weights", "a classifier without weights has random values");
            return Err(of_tower(refusal.help(
                "name a run directory, an exported folder or a file; `{stage: NAME}` is an earlier stage's classifier",
            )));
        }
        let is_looked_at = towers.environment == Environment::Checked && !tower.is_drawn();
        let found = if is_looked_at { Some(find(slot, options, &shape)?) } else { None };
        let noted = found.as_ref().and_then(|found| found.noted);
        let (pooling, tap) = match (noted, &found) {
            (Some(noted), _) => noted,
            (None, Some(found)) if found.head.has_norm => (Pooling::Mean, FeatureTap::Block),
            (None, Some(found)) if !shape.cls_token || found.reads_mean => (Pooling::Mean, FeatureTap::Norm),
            (None, _) => (Pooling::Cls, FeatureTap::Norm),
        };
        let (pooling, tap) = (options.pooling.unwrap_or(pooling), options.tap.unwrap_or(tap));
        let head = found.map(|found| found.head);
        if head.as_ref().is_some_and(|head| head.has_norm) && pooling == Pooling::Cls {
            let message = "the class token is asked for, and the classifier has a norm of averaged tokens (`fc_norm`)";
            return Err(Refusal::new("pooling", message)
                .help("leave `pooling` out: it follows from the weights")
                .under("head"));
        }
        let check = || {
            if head.is_some() || options.pooling.is_some() {
                pooling.check("the tower", &shape)?;
            }
            if head.is_some() && tap == FeatureTap::Norm {
                shape.check_tap("the tower", Tap::Norm)?;
            }
            Ok(())
        };
        check().map_err(|refusal: Refusal| refusal.under("head"))?;
        Ok(PlannedHeld { tower, head, view: View { pooling, tap, batch }, scope: scope.to_owned() })
    }

    /// The shape of its tower.
    pub(super) fn tower(&self) -> TowerShape {
        self.tower.shape()
    }

    /// How many classes it tells apart, where files were looked at.
    pub(super) fn classes(&self) -> Option<usize> {
        self.head.as_ref().map(|head| head.classes)
    }

    /// The classifier with its values.
    ///
    /// # Errors
    /// Weights that have gone or changed since they were planned; out of memory.
    pub(super) fn build(&self, cx: &Context, seed: u64, trained: &TrainedStudents) -> Result<Held> {
        let missing = || Refusal::new("classifier", "its weights were not looked at: plan with the environment");
        let head = self.head.as_ref().ok_or_else(missing)?;
        let init = Init::new(cx.device(), seed, &*self.scope);
        let mut student = self.tower.build(&init, trained).map_err(|e| under(e, "classifier"))?;
        student.set_reach(Reach {
            blocks: student.shape().arch.depth,
            norm: self.view.tap == FeatureTap::Norm,
            qkv: false,
        });
        student.set_role(Role::Frozen);
        let values = head.read().map_err(|error| Refusal::new("head", error.to_string()))?;
        let init = &init.of_role(Role::Head);
        let (classes, width) = (head.classes, head.width);
        let mut layer = Linear::new(init, "head", classes, width, Bias::With)?;
        layer.weight.load(&values.weight)?;
        layer.bias.iter_mut().try_for_each(|bias| bias.load(&values.bias))?;
        let mut held = Held { student, view: self.view, norm: None, statistics: None, layer };
        if let Some([weight, bias]) = &values.norm {
            // What a run leaves has `finetune`'s norm.
            let eps = if head.of_run { 1e-6 } else { self.tower.shape().eps };
            let mut norm = Norm::new(init, "fc_norm", width, eps)?;
            let mut values = [weight, bias].into_iter();
            let mut loaded = Ok(());
            norm.visit(&mut |p| {
                if let (Some(values), Ok(())) = (values.next(), &loaded) {
                    loaded = p.load(values);
                }
            });
            loaded?;
            held.norm = Some(norm);
        }
        if let Some([mean, variance]) = &values.statistics {
            let mut statistics = BatchNorm::plain(init, "head.0", width, linear_probe::EPS)?;
            statistics.running_mean.load(mean)?;
            statistics.running_var.load(variance)?;
            held.statistics = Some(statistics);
        }
        Ok(held)
    }
}

/// A head, and what is known of how it reads its tower.
struct Found {
    head: Head,
    /// What the linear probe of a run read.
    noted: Option<(Pooling, FeatureTap)>,
    /// Whether a configuration says that it reads the mean.
    reads_mean: bool,
}

/// Finds the head of a tower, and refuses one that does not fit it.
///
/// # Errors
/// Names `head.weights` or `classifier.weights`.
fn find(slot: &Slot<StudentTag>, options: &HeadOptions, shape: &TowerShape) -> Result<Found, Refusal> {
    let at = match options.weights {
        Some(_) => "head",
        None => "classifier",
    };
    let refuse = |message: String| Refusal::new("weights", message).under(at);
    let unread = |error: WeightsError| refuse(error.to_string());
    let spec = match &options.weights {
        Some(weights) => Some(weights.clone()),
        None => slot.options.get("weights").and_then(|weights| serde_json::from_value(weights.clone()).ok()),
    };
    let no_head = |whose: &str| {
        refuse(format!("{whose} no classifier")).help(
            "name weights with one (timm's `head.weight`, Hugging Face's `classifier.weight`, what `finetune` or `linear_probe` of a \
             run left), or say where it is: `head: { weights: PATH }`",
        )
    };
    let Some(spec) = spec else { return Err(no_head("the weights have")) };
    let Some((file, key)) = spec.file() else {
        return Err(match spec {
            Weights::Stage(stage) => refuse(format!(
                "the student of stage `{stage}` alone is meant here, which is no classifier"
            ))
            .help(format!("`classifier: {{ stage: {stage} }}` is the classifier that it leaves, where it trains one")),
            _ => no_head("the embedded weights have"),
        });
    };
    let path = weights::locate(&file.to_string()).map_err(unread)?;
    let (head, described) = match options.weights {
        Some(_) => {
            if !path.exists() {
                return Err(refuse(format!("there is no file `{}`", path.display())));
            }
            let file = weights::head_file(&path).map_err(unread)?;
            (Head::find(&file, key, None).map_err(unread)?, file)
        }
        None => {
            // The tower was found there.
            let family = if shape.layer_scale.is_some() { Family::Dinov2 } else { Family::Vit };
            let beside = Head::find(&path, key, Some(family)).map_err(unread)?;
            let head = match beside {
                Some(head) => Some(head),
                None => probe_of(&path).map_err(unread)?,
            };
            (head, path)
        }
    };
    let Some(head) = head else { return Err(no_head(&format!("{spec} holds"))) };
    if head.width != shape.arch.dim {
        return Err(refuse(format!(
            "the classifier in {spec} reads {} values, and the tower gives {}",
            head.width, shape.arch.dim
        )));
    }
    let is_probe = head.of_run && head.has_statistics;
    let probe = stage_that_left(&head.file).filter(|_| is_probe);
    let noted = probe.and_then(|(run, stage)| stage_of(&run, &stage)).map(|options| view_of(&options));
    if is_probe && noted.is_none() && (options.pooling.is_none() || options.tap.is_none()) {
        return Err(Refusal::new(
            "head",
            format!("the recipe of the run that left {} is not there", head.file.display()),
        )
        .help("say what its linear probe read: `head: { pooling: cls, tap: norm }` is what it reads by default"));
    }
    let described = weights::describe(&described).map_err(unread)?;
    Ok(Found { head, noted, reads_mean: described.reads_mean.is_some_and(|said| said.value) })
}

/// The run and the stage that left a file, `RUN/checkpoints/STAGE/final.safetensors`.
fn stage_that_left(file: &Path) -> Option<(PathBuf, String)> {
    let folder = file.parent()?;
    let checkpoints = folder.parent().filter(|parent| parent.ends_with("checkpoints"))?;
    Some((checkpoints.parent()?.to_owned(), folder.file_name()?.to_str()?.to_owned()))
}

/// The options of a stage of a run, by the run's recipe.
fn stage_of(run: &Path, stage: &str) -> Option<Value> {
    // A run directory may be the current one.
    let run = if run.as_os_str().is_empty() { Path::new(".") } else { run };
    let text = RunDir::look_at(run).ok()?.read_recipe().ok()??;
    parse_value(&text).ok()?.get_mut("stages")?.get_mut(stage).map(Value::take)
}

/// What a linear probe with these options reads.
fn view_of(options: &Value) -> (Pooling, FeatureTap) {
    let read = |option: &str| options.get(option).cloned().unwrap_or_default();
    let pooling = serde_json::from_value(read("pooling")).unwrap_or(linear_probe::POOLING);
    (pooling, serde_json::from_value(read("tap")).unwrap_or(linear_probe::TAP))
}

/// What the linear probe of a run left that was trained on the student in `path`, a run directory or what a stage of it
/// left.
fn probe_of(path: &Path) -> Result<Option<Head>, WeightsError> {
    let Some(student) = weights::files_of(path)?.first().and_then(|file| stage_that_left(file)) else {
        return Ok(None);
    };
    let (run, of_student) = student;
    let is_its = |stage: &str| {
        let options = stage_of(&run, stage);
        let origin = options.as_ref().and_then(|options| options.get("student")?.get("weights")?.get("stage"));
        origin.is_some_and(|origin| *origin == *of_student)
    };
    // What was trained together with a student is the head of that student alone.
    let is_alone = |file: &Path| CheckpointHeader::read(file).is_ok_and(|header| header.student.is_empty());
    let heads = weights::heads_of_run(&run).into_iter();
    let mut heads: Vec<_> = heads.filter(|(stage, file)| is_its(stage) && is_alone(file)).collect();
    match heads.pop() {
        None => Ok(None),
        Some((_, file)) if heads.is_empty() => Head::find(&file, None, None),
        Some((last, file)) => {
            let stages: Vec<String> = heads.into_iter().map(|(stage, _)| stage).chain([last]).collect();
            Err(WeightsError::format(
                path,
                format!(
                    "the stages `{}` of the run left classifiers of its student; name one, as `head: {{ weights: {} }}`",
                    stages.join("`, `"),
                    file.parent().unwrap_or(&file).display()
                ),
            ))
        }
    }
}

/// A tower with its head.
pub(super) struct Held {
    student: Box<dyn StudentModel>,
    view: View,
    norm: Option<Norm>,
    statistics: Option<BatchNorm>,
    layer: Linear,
}

impl Classify for Held {
    fn classes(&self) -> usize {
        self.layer.outputs()
    }

    fn scores(&self, cx: &Context, images: &ImageBatch) -> Result<Tensor> {
        let off = &mut Tape::inference();
        let mut x = Tower::Student(&*self.student).features(cx, images, self.view)?;
        if let Some(norm) = &self.norm {
            x = norm.forward(cx, off, &x)?;
        }
        if let Some(statistics) = &self.statistics {
            x = statistics.evaluate(cx, off, &x)?;
        }
        Ok(self.layer.forward(cx, off, &x, Act::None)?)
    }
}
