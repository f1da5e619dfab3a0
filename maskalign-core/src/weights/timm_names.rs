//! What the names of timm's architectures say: a file's `config.json` has the name, and timm's code the sizes.

/// An activation, as configuration files call it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SaidActivation {
    /// x sigmoid(1.702 x).
    QuickGelu,
    /// The exact GELU.
    Gelu,
    /// Another, by its name.
    Other(String),
}

/// What the name of an architecture stands for.
#[derive(Clone, Debug, PartialEq)]
pub struct TimmName {
    /// Channels; the MLP is four times as wide.
    pub dim: usize,
    /// Blocks.
    pub depth: usize,
    /// Attention heads.
    pub heads: usize,
    /// Side of a patch in pixels.
    pub patch: usize,
    /// Register tokens.
    pub registers: usize,
    /// Whether a class token leads.
    pub cls_token: bool,
    /// Added to the variance in LayerNorms.
    pub eps: f64,
    /// Activation of the MLPs.
    pub activation: SaidActivation,
}

/// The architecture of that name, such as `vit_base_patch16_clip_quickgelu_224`; `None` for one that is no plain vision
/// transformer, or whose name does not say all of it. The names and their sizes are timm's (1.0); the tests hold every
/// name that it has against it.
pub fn timm_name(name: &str) -> Option<TimmName> {
    let (family, rest) = name.split_once('_')?;
    let (size, rest) = rest.split_once("_patch")?;
    let (dim, depth, heads) = match size {
        "tiny" => (192, 12, 3),
        "small" => (384, 12, 6),
        "base" => (768, 12, 12),
        "large" => (1024, 24, 16),
        "huge" => (1280, 32, 16),
        _ => return None,
    };
    let (patch, rest) = rest.split_once('_')?;
    let mut named = TimmName {
        dim,
        depth,
        heads,
        patch: patch.parse().ok()?,
        registers: 0,
        cls_token: true,
        eps: 1e-6,
        activation: SaidActivation::Gelu,
    };
    let is_resolution = |text: &str| text.len() == 3 && text.bytes().all(|b| b.is_ascii_digit());
    match (family, rest.rsplit_once('_').map_or(("", rest), |(kind, last)| (kind, last))) {
        ("vit" | "deit", ("", resolution)) if is_resolution(resolution) => {}
        ("vit", ("clip", resolution)) if is_resolution(resolution) => named.eps = 1e-5,
        ("vit", ("clip_quickgelu", resolution)) if is_resolution(resolution) => {
            named.eps = 1e-5;
            named.activation = SaidActivation::QuickGelu;
        }
        ("vit", ("", "dinov2")) => {}
        ("vit", ("reg4", "dinov2")) => named.registers = 4,
        _ => return None,
    }
    Some(named)
}
