//! The map from the student's outputs to the shape of the target.

mod decoder;
mod dynamic;
mod projection_head;
mod relations;
mod shared;

use maskalign_engine::{Context, Recompute, Result, Tape, Tensor};
use maskalign_registry::{LevelRef, Refusal};

pub use dynamic::{Fusion, Head};

use crate::{
    components::{
        maskers::Counts,
        relations::Relations,
        tokens::{Masks, Tokens},
        towers::{Tap, TowerShape},
    },
    nn::{Init, Module},
};

/// What an alignment is asked before the first step.
///
/// ```
/// # use maskalign_core::prelude::*;
/// # let config = VitConfig::plain(Arch { dim: 8, depth: 2, heads: 2, mlp: 32, patch: 4 }, 8);
/// # let student = TowerShape::from(&config);
/// fn check(plan: &AlignPlan) -> Result<(), Refusal> {
///     match plan.outputs {
///         1 => Ok(()),
///         n => Err(Refusal::whole(format!("there is one output, the target has {n}")).help("choose one level of it")),
///     }
/// }
///
/// let (counts, tokens) = (Counts { visible: 1, masked: 3 }, Tokens { visible: true, ..Tokens::default() });
/// let (target_depth, target_levels, wanted) = (12, vec![10, 11], vec![0, 1]);
/// let (blocks, outputs, width, relations) = (1, 2, 64, None);
/// let plan = AlignPlan {
///     student, counts, blocks, tokens, target_depth, target_levels, outputs, wanted, width, relations,
/// };
/// assert!(check(&plan).is_err());
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct AlignPlan {
    /// The student.
    pub student: TowerShape,
    /// Visible and predicted patches of an image.
    pub counts: Counts,
    /// In how many blocks the predicted patches come, which are predicted without a look at each other.
    pub blocks: usize,
    /// Tokens that the objective compares.
    pub tokens: Tokens,
    /// Depth of the tower that the targets come from.
    pub target_depth: usize,
    /// Its levels that the target lists, in order.
    pub target_levels: Vec<usize>,
    /// Outputs of the target: one per level, or one where it combines them.
    pub outputs: usize,
    /// Which of the outputs have a weight: the alignment gives these, in order, and no other.
    pub wanted: Vec<usize>,
    /// Channels of the target.
    pub width: usize,
    /// The relations of tokens that the target is of, where it is of relations: outputs then have a row for each token and
    /// head, and its width is the number of tokens.
    pub relations: Option<Relations>,
}

impl AlignPlan {
    /// Refuses tokens that are none of the student's rows, for a map from each row to an output; `what` is the map.
    ///
    /// # Errors
    /// The alignment as a whole, with the tokens beside it.
    pub fn check_tokens(&self, what: &str) -> Result<(), Refusal> {
        if self.tokens.masked && !self.student.held().masked {
            let help = "leave `masked` out of `tokens`, use the aligner `decoder`, or a student with `masked_patches: mask_token`";
            return Err(Refusal::whole(format!("{what} for the student's tokens only"))
                .beside(["tokens"], "`masked` is asked for here")
                .help(help));
        }
        if self.tokens.cls && !self.student.cls_token {
            return Err(Refusal::whole("the student has no class token to align")
                .beside(["tokens"], "`cls` is asked for here")
                .in_stage(["student", "cls_token"], "left out here")
                .help("leave `cls` out of `tokens`, or set `cls_token: true` for the student"));
        }
        Ok(())
    }
}

/// What an alignment needs of the student.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let needs = AlignNeeds { levels: Levels::Last(2).resolve(12)?, tap: Tap::Norm };
/// assert_eq!(needs.levels, [LevelRef::Block(10), LevelRef::Block(11)]);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AlignNeeds {
    /// The student's levels, in the order in which the alignment is given them.
    pub levels: Vec<LevelRef>,
    /// Where they are taken.
    pub tap: Tap,
}

/// What an alignment is computed from.
///
/// ```
/// # use maskalign_core::{Device, prelude::*};
/// # let cx = Context::new(Device::Cpu, 1);
/// // One image: the rows of its class token and of two visible patches, of which the objective compares the patches.
/// let levels = [cx.tensor(vec![0.0, 1.0, 2.0], 3, 1)?];
/// let held = Tokens { cls: true, visible: true, masked: false };
/// let masks = Masks::even(1, vec![3, 0], vec![1]);
/// let input = AlignInput { levels: &levels, held, masks: &masks, tokens: Tokens { cls: false, ..held } };
///
/// let rows = input.masks.within(input.tokens, input.held).expect("fewer than are held");
/// let x = ops::gather_rows(&cx, &mut Tape::inference(), &[&input.levels[0]], &rows)?;
/// assert_eq!(x.to_vec(), [1.0, 2.0]);
/// # Ok::<(), Error>(())
/// ```
pub struct AlignInput<'a> {
    /// The student's levels that it asked for, `[batch * held, dim]`; the rows of an image are its class token (where
    /// the student has one), its visible patches, and its masked ones (where the student shows mask tokens).
    pub levels: &'a [Tensor],
    /// The tokens that those rows are.
    pub held: Tokens,
    /// The masks.
    pub masks: &'a Masks,
    /// The tokens wanted.
    pub tokens: Tokens,
}

/// An alignment's options.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// One linear layer from the student's last level.
/// #[component]
/// struct Straight {}
///
/// impl Aligner for Straight {
///     fn plan(&self, plan: &AlignPlan) -> Result<Box<dyn PlannedAligner>, Refusal> {
///         if plan.tokens.masked {
///             return Err(Refusal::whole("there are outputs for the student's tokens only"));
///         }
///         let levels = vec![LevelRef::Block(plan.student.arch.depth - 1)];
///         let needs = AlignNeeds { levels, tap: Tap::Block };
///         Ok(Box::new(PlannedStraight { needs, from: plan.student.arch.dim, to: plan.width }))
///     }
/// }
///
/// register!(aligner "straight" => Straight, "one linear layer", example: "{ type: straight }");
/// # struct PlannedStraight { needs: AlignNeeds, from: usize, to: usize }
/// # impl PlannedAligner for PlannedStraight {
/// #     fn needs(&self) -> &AlignNeeds { &self.needs }
/// #     fn build(&self, _: &Init) -> Result<Box<dyn AlignerModel>> { unimplemented!() }
/// # }
/// ```
pub trait Aligner: Send + Sync {
    /// Whether it gives relations of tokens. Its levels are then what the attention of these blocks is computed from, in place
    /// of their states: queries, keys and values side by side, `[batch * held, 3 * dim]`; every one of its needs is a block.
    fn relates(&self) -> bool {
        false
    }
    /// Checks them, and gives what builds the alignment.
    ///
    /// # Errors
    /// Names the option that does not fit the depths, tokens or widths.
    fn plan(&self, plan: &AlignPlan) -> Result<Box<dyn PlannedAligner>, Refusal>;

    /// The objective whose alignment it is, where it has none of its own; it is not planned then.
    fn shares(&self) -> Option<&str> {
        None
    }
}

/// An alignment whose options fit.
///
/// ```
/// # use maskalign_core::prelude::*;
/// struct PlannedStraight {
///     needs: AlignNeeds,
///     from: usize,
///     to: usize,
/// }
///
/// impl PlannedAligner for PlannedStraight {
///     fn needs(&self) -> &AlignNeeds {
///         &self.needs
///     }
///
///     fn build(&self, init: &Init) -> Result<Box<dyn AlignerModel>> {
///         Ok(Box::new(Straight(Linear::new(init, "straight", self.to, self.from, Bias::With)?)))
///     }
/// }
/// # struct Straight(Linear);
/// # impl Module for Straight { fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) { self.0.visit(f) } }
/// # impl AlignerModel for Straight {
/// #     fn forward(&self, _: &Context, _: &mut Tape, _: &AlignInput) -> Result<Vec<Tensor>> { unimplemented!() }
/// # }
///
/// let needs = AlignNeeds { levels: vec![LevelRef::Block(11)], tap: Tap::Block };
/// let mut model = PlannedStraight { needs, from: 4, to: 2 }.build(&Init::shapes())?;
/// assert_eq!(model.shapes()[0], ("straight.weight".to_string(), vec![2, 4]));
/// # Ok::<(), Error>(())
/// ```
pub trait PlannedAligner: Send + Sync {
    /// What it needs of the student.
    fn needs(&self) -> &AlignNeeds;
    /// About how many values of each image a step keeps for its backward pass, inside the alignment; for estimates of
    /// memory. With [`Recompute::Blocks`], blocks keep their input alone.
    fn kept(&self, _recompute: Recompute) -> usize {
        0
    }
    /// For how many epochs of the stage a parameter stays as it began, by its name in [`PlannedAligner::build`].
    fn held_epochs(&self, _parameter: &str) -> f64 {
        0.0
    }
    /// Makes its parameters. Those that no output reaches must be marked as not trained.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn build(&self, init: &Init) -> Result<Box<dyn AlignerModel>>;
}

/// A trained map from the student's outputs to the target's shape.
///
/// ```
/// # use maskalign_core::{Device, prelude::*};
/// struct Straight(Linear);
///
/// impl Module for Straight {
///     fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
///         self.0.visit(f);
///     }
/// }
///
/// impl AlignerModel for Straight {
///     fn forward(&self, cx: &Context, tape: &mut Tape, input: &AlignInput) -> Result<Vec<Tensor>> {
///         let mut x = input.levels[0].clone();
///         if let Some(rows) = input.masks.within(input.tokens, input.held) {
///             x = ops::gather_rows(cx, tape, &[&x], &rows)?;
///         }
///         Ok(vec![self.0.forward(cx, tape, &x, Act::None)?])
///     }
/// }
/// # let cx = Context::new(Device::Cpu, 1);
/// # let model = Straight(Linear::new(&Init::new(cx.device(), 0, "x"), "straight", 2, 1, Bias::With)?);
/// # let levels = [cx.tensor(vec![0.0, 1.0, 2.0], 3, 1)?];
/// # let held = Tokens { cls: true, visible: true, masked: false };
/// # let masks = Masks::even(1, vec![3, 0], vec![1]);
/// # let input = AlignInput { levels: &levels, held, masks: &masks, tokens: Tokens { cls: false, ..held } };
/// # assert_eq!(model.forward(&cx, &mut Tape::training(), &input)?[0].shape(), (2, 2));
/// # Ok::<(), Error>(())
/// ```
pub trait AlignerModel: Module {
    /// The predictions, `[batch * tokens, width]` each; the rows of an image are its class token, visible and masked
    /// patches, as far as [`AlignInput::tokens`] has them. Of [relations](AlignPlan::relations) there is a row for each
    /// token and head.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn forward(&self, cx: &Context, tape: &mut Tape, input: &AlignInput) -> Result<Vec<Tensor>>;
}
