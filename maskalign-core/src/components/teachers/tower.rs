//! The vision transformer as a teacher.

use std::collections::BTreeMap;

use maskalign_engine::{Context, ImageBatch, Result, Tape, Tensor};

use super::{Level, Pass, PlannedTeacher, TeacherBuild, TeacherModel, Wants};
use crate::{
    components::{
        tokens::Masks,
        towers::{self, PlannedTower, Tap, TowerShape},
    },
    error::Error,
    nn::{Init, Module, Param, Vit},
};

impl PlannedTeacher for PlannedTower {
    fn shape(&self) -> TowerShape {
        PlannedTower::shape(self)
    }

    fn gives_qkv(&self) -> bool {
        true
    }

    fn build(&self, build: &mut TeacherBuild) -> Result<Box<dyn TeacherModel>, Error> {
        let device = build.cx.device();
        let init = match self.is_drawn() {
            true => Init::new(device, 0, "random teacher"),
            false => Init::blank(device),
        };
        Ok(Box::new(TowerTeacher::new(PlannedTower::build(self, &init, build.trained)?, build.cx)?))
    }
}

/// A frozen vision transformer with packed weights.
///
/// ```
/// # use maskalign_core::{Device, prelude::*};
/// # let cx = Context::new(Device::Cpu, 1);
/// # let config = VitConfig::plain(Arch { dim: 8, depth: 2, heads: 2, mlp: 32, patch: 4 }, 8);
/// let teacher = TowerTeacher::new(Vit::new(&Init::blank(cx.device()), config)?, &cx)?;
/// assert_eq!(teacher.shape().tokens(), 5);
/// # Ok::<(), Error>(())
/// ```
pub struct TowerTeacher {
    vit: Vit,
}

impl TowerTeacher {
    /// Freezes the tower and packs its weights.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn new(mut vit: Vit, cx: &Context) -> Result<Self> {
        vit.pack(cx)?;
        Ok(TowerTeacher { vit })
    }
}

impl Module for TowerTeacher {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.vit.visit(f);
    }
}

impl TeacherModel for TowerTeacher {
    fn shape(&self) -> TowerShape {
        TowerShape::from(&self.vit.config)
    }

    fn begin(&self, cx: &Context, images: &ImageBatch, wants: &Wants) -> Result<Pass> {
        let last = self.vit.blocks.len() - 1;
        let keep = |level: usize| wants.levels.contains(&level) || wants.qkv.contains(&(level + 1));
        if wants.attention || keep(last) {
            let (features, mut begun) = self.vit.begin(cx, images, keep)?;
            let attention = std::mem::take(&mut begun.attention);
            return Ok(Pass { attention, features, begun: keep(last).then_some(begun) });
        }
        let reach = wants.levels.last().map_or(0, |level| level + 1).max(wants.qkv.last().copied().unwrap_or(0));
        let mut features = self.vit.embed(cx, &mut Tape::inference(), images, None)?;
        self.vit.run_blocks(cx, &mut Tape::inference(), &mut features, 0..reach, None, keep)?;
        Ok(Pass { attention: Vec::new(), features, begun: None })
    }

    fn finish(&self, cx: &Context, pass: Pass, wants: &Wants, masks: &Masks) -> Result<BTreeMap<usize, Level>> {
        let last = self.vit.blocks.len() - 1;
        let mut levels = BTreeMap::new();
        if let Some(begun) = pass.begun {
            // Nothing but these rows reaches a loss. A block's end has equally many of each image.
            let only = (!wants.whole && masks.uneven.is_none()).then_some(wants.tokens);
            let rows = only.map(|tokens| masks.rows(tokens, self.vit.config.cls_token));
            let x = self.vit.finish(cx, &pass.features, begun, rows.as_deref())?;
            levels.insert(last, Level { x, only });
        }
        levels.extend(pass.features.hidden.into_iter().map(|(i, x)| (i, Level { x, only: None })));
        Ok(levels)
    }

    fn queries_keys_values(&self, cx: &Context, pass: &Pass, block: usize) -> Result<Option<Tensor>> {
        self.vit.queries_keys_values(cx, &mut Tape::inference(), &pass.features, block).map(Some)
    }

    fn tap(&self, cx: &Context, x: &Tensor, tap: Tap) -> Result<Tensor> {
        towers::tap(cx, &mut Tape::inference(), &self.vit, x, tap)
    }

    fn class_attention(&self, cx: &Context, images: &ImageBatch) -> Result<Option<Vec<f32>>> {
        self.vit.class_attention(cx, images)
    }
}
