//! The vision transformer as a teacher.

use std::collections::BTreeMap;

use maskalign_registry::Weights;

use super::{Level, Pass, Teacher, Wants};
use crate::{
    components::{
        tokens::Masks,
        towers::{self, PlanContext, Tap, TowerShape},
    },
    context::Context,
    device::{Dev, Matrix},
    error::Result,
    images::ImageBatch,
    nn::{Init, Module, Param, Vit, VitConfig},
    tape::Recorder,
    weights::Family,
};

/// A frozen vision transformer with packed weights.
pub struct TowerTeacher<D: Dev> {
    vit: Vit<D>,
}

impl<D: Dev> TowerTeacher<D> {
    /// Builds the tower, reads its weights and packs them.
    ///
    /// # Errors
    /// Weights that are missing or do not fit; out of memory on the device.
    pub fn load(
        plan: &PlanContext,
        cx: &Context<D>,
        config: VitConfig,
        source: &Weights,
        family: Family,
    ) -> Result<Self> {
        let mut vit = if plan.invents(source) {
            Vit::new(&Init::new(&cx.dev, 0, "random teacher"), config)?
        } else {
            let mut vit = Vit::new(&Init::blank(&cx.dev), config)?;
            towers::load_tower(plan, &mut vit, source, family)?;
            vit
        };
        vit.pack(cx)?;
        Ok(TowerTeacher { vit })
    }
}

impl<D: Dev> Module<D> for TowerTeacher<D> {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param<D>)) {
        self.vit.visit(f);
    }
}

impl<D: Dev> Teacher<D> for TowerTeacher<D> {
    fn shape(&self) -> TowerShape {
        TowerShape::from(&self.vit.config)
    }

    fn begin(&self, cx: &Context<D>, images: &ImageBatch, wants: &Wants) -> Result<Pass<D>> {
        let last = self.vit.blocks.len() - 1;
        let keep = |level: usize| wants.levels.contains(&level);
        if wants.attention || keep(last) {
            let (features, mut begun) = self.vit.begin(cx, images, keep)?;
            let attention = std::mem::take(&mut begun.attention);
            return Ok(Pass { attention, features, begun: keep(last).then_some(begun) });
        }
        let reach = wants.levels.last().map_or(0, |level| level + 1);
        let mut features = self.vit.embed(cx, &mut Recorder::inference(), images, None)?;
        self.vit.run_blocks(cx, &mut Recorder::inference(), &mut features, 0..reach, None, keep)?;
        Ok(Pass { attention: Vec::new(), features, begun: None })
    }

    fn finish(
        &self,
        cx: &Context<D>,
        pass: Pass<D>,
        wants: &Wants,
        masks: &Masks,
    ) -> Result<BTreeMap<usize, Level<D>>> {
        let last = self.vit.blocks.len() - 1;
        let mut levels = BTreeMap::new();
        if let Some(begun) = pass.begun {
            // Nothing but these rows reaches a loss.
            let only = (!wants.whole).then_some(wants.tokens);
            let rows = only.map(|tokens| masks.rows(tokens, self.vit.config.cls_token));
            let x = self.vit.finish(cx, &pass.features, begun, rows.as_deref())?;
            levels.insert(last, Level { x, only });
        }
        levels.extend(pass.features.hidden.into_iter().map(|(i, x)| (i, Level { x, only: None })));
        Ok(levels)
    }

    fn tap(&self, cx: &Context<D>, x: &Matrix<D>, tap: Tap) -> Result<Matrix<D>> {
        towers::tap(cx, &mut Recorder::inference(), &self.vit, x, tap)
    }
}
