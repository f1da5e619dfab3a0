//! The student's own moving average.

use std::{collections::BTreeMap, sync::Arc};

use maskalign_engine::{Context, ImageBatch, Result, Role, Tape, Tensor};
use maskalign_registry::{Refusal, Scalar};

use super::{Level, Pass, PlannedTeacher, Teacher, TeacherBuild, TeacherModel, Wants};
use crate::{
    component,
    components::{
        students::{PlannedStudent, StudentModel},
        tokens::Masks,
        towers::{PlanContext, Tap, TowerShape},
    },
    error::Error,
    nn::{Init, Module, Param, begin_as, follow},
    register,
};

/// A moving average of the student's parameters: it starts as the student, and after each update
/// `teacher = momentum teacher + (1 - momentum) student` (BYOL, DINO, data2vec); with momentum 1 it stays the student as it was
/// at the beginning (dBOT's first stage). It sees every patch, without stochastic
/// depth, and takes no gradient. Checkpoints hold it; later stages and exports take the student.
#[component]
struct Ema {
    /// What is kept of the teacher in an update: a number, or one that changes over the stage.
    momentum: Scalar,
}

impl Teacher for Ema {
    fn plan(&self, cx: &PlanContext) -> Result<Box<dyn PlannedTeacher>, Refusal> {
        let (least, most) = self.momentum.bounds();
        if least < 0.0 || most > 1.0 {
            return Err(Refusal::new("momentum", format!("expected a share in 0..=1, found {}", self.momentum)));
        }
        let Some(student) = cx.student else {
            return Err(Refusal::whole("`ema` follows the student that a stage trains, and this stage trains none")
                .help("to look at an earlier stage's student, use `type: vit` with `weights: {stage: NAME}`"));
        };
        Ok(Box::new(PlannedEma { momentum: self.momentum, student: Arc::clone(student) }))
    }
}

/// A momentum that fits, and what builds a tower of the student's shape.
struct PlannedEma {
    momentum: Scalar,
    student: Arc<dyn PlannedStudent>,
}

impl PlannedTeacher for PlannedEma {
    fn shape(&self) -> TowerShape {
        self.student.shape()
    }

    fn gives_attention(&self) -> bool {
        self.student.gives_attention()
    }

    fn gives_qkv(&self) -> bool {
        self.student.gives_qkv()
    }

    fn moves(&self) -> bool {
        true
    }

    fn build(&self, build: &mut TeacherBuild) -> Result<Box<dyn TeacherModel>, Error> {
        let Some((planned, student)) = &mut build.student else {
            return Err(Error::Usage("a moving average is built beside the student that it follows".into()));
        };
        let init = Init::blank(build.cx.device()).of_role(Role::Moving);
        let mut tower = planned.build(&init, build.trained)?;
        begin_as(&mut *tower, &mut **student);
        Ok(Box::new(MovingTeacher { tower, momentum: self.momentum }))
    }
}

/// A student that follows another.
struct MovingTeacher {
    tower: Box<dyn StudentModel>,
    momentum: Scalar,
}

impl Module for MovingTeacher {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.tower.visit(f);
    }
}

impl TeacherModel for MovingTeacher {
    fn shape(&self) -> TowerShape {
        self.tower.shape()
    }

    fn begin(&self, cx: &Context, images: &ImageBatch, wants: &Wants) -> Result<Pass> {
        let keep = |level: usize| wants.levels.contains(&level) || wants.qkv.contains(&(level + 1));
        if wants.attention {
            let (features, attention) = self.tower.forward_attending(cx, images, &keep)?;
            return Ok(Pass { attention, features, begun: None });
        }
        let features = self.tower.forward(cx, &mut Tape::inference(), images, None, None, &keep)?;
        Ok(Pass { attention: Vec::new(), features, begun: None })
    }

    fn finish(&self, _: &Context, pass: Pass, _: &Wants, _: &Masks) -> Result<BTreeMap<usize, Level>> {
        Ok(pass.features.hidden.into_iter().map(|(i, x)| (i, Level { x, only: None })).collect())
    }

    fn queries_keys_values(&self, cx: &Context, pass: &Pass, block: usize) -> Result<Option<Tensor>> {
        self.tower.queries_keys_values(cx, &mut Tape::inference(), &pass.features, block)
    }

    fn tap(&self, cx: &Context, x: &Tensor, tap: Tap) -> Result<Tensor> {
        match tap {
            Tap::Block => Ok(x.clone()),
            // A student has no projection: a target that taps one was refused.
            Tap::Norm | Tap::Projection => self.tower.norm(cx, &mut Tape::inference(), x),
        }
    }

    fn after_update(&mut self, cx: &Context, student: &mut dyn StudentModel, progress: f64) -> Result<()> {
        follow(cx, &mut *self.tower, student, self.momentum.at(progress))
    }

    fn momentum(&self, progress: f64) -> Option<f64> {
        Some(self.momentum.at(progress))
    }

    fn class_attention(&self, cx: &Context, images: &ImageBatch) -> Result<Option<Vec<f32>>> {
        self.tower.class_attention(cx, images)
    }
}

register!(teacher "ema" => Ema, "a moving average of the student",
    example: "{ type: ema, momentum: { from: 0.996, to: 1.0, shape: cosine } }",
    paper: "BYOL, arXiv 2006.07733; data2vec, arXiv 2202.03555");
