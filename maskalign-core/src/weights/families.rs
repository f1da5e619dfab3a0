//! The names that each family of checkpoints uses, and one naming for all: timm's, which MAE, DINO and the official
//! MaskAlign student share.
//!
//! ```text
//! cls_token [1,1,C]   pos_embed [1,1+N,C]   patch_embed.proj.{weight [C,3,p,p], bias [C]}   norm_pre.{weight,bias}
//! blocks.I.norm1.*  blocks.I.attn.qkv.{weight [3C,C], bias}  blocks.I.attn.proj.*  blocks.I.ls1.gamma
//! blocks.I.norm2.*  blocks.I.mlp.fc1.{weight [M,C], bias}    blocks.I.mlp.fc2.*    blocks.I.ls2.gamma
//! norm.*   head.weight [E,C] (CLIP's projection)
//! ```

use std::collections::{BTreeMap, BTreeSet};

use super::element::element_count;
use super::mismatch::Mismatch;
use super::naming::{
    Change::{self, Same, Third, ToRank, Transposed},
    Family, Naming, Row, Writes, namings,
};
use super::positions::{transposed, without_class_row};
use super::{HostTensor, TensorMap, WeightsError};
use maskalign_registry::source::visible_lines;

/// Weights under the one naming, with an account of all the rest.
#[derive(Debug, Clone, PartialEq)]
pub struct Canonical {
    /// The tower's tensors.
    pub tensors: TensorMap,
    /// The token that stood for masked patches in its pre-training, `[1, 1, C]`, for towers that show one again; it is among
    /// those left out.
    pub mask_token: Option<HostTensor>,
    /// The naming that was found.
    pub naming: &'static str,
    /// What stands before the tower's names.
    pub prefix: String,
    /// What stands before the names of other towers in the file.
    pub others: Vec<String>,
    /// Tensors left out, each with the rule that says so, sorted by name.
    pub ignored: Vec<(String, &'static str)>,
}

/// Parts of names that programs put around modules, wherever these stand: torch.compile, fully sharded training, activation
/// checkpointing.
const WRAPPED: [&str; 3] = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];

/// What programs call the token that stands for masked patches: timm, BEiT, data2vec and SimMIM; Hugging Face; iBOT.
const MASK_TOKENS: [&str; 3] = ["mask_token", "embeddings.mask_token", "masked_embed"];

/// LayerScale's vectors in files of BEiT's lineage, and their names in timm.
const SCALES: [(&str, &str); 2] = [("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")];

/// Rules that leave out tensors beside a tower. A name that ends in `.` or `_` stands for all that begin with it; the first row that
/// fits counts.
const OUTSIDE: &[(&str, &str)] = &[
    ("text_model.", "text tower"),
    ("text.", "text tower"),
    ("text_projection", "text tower"),
    ("text_projection.", "text tower"),
    ("token_embedding.", "text tower"),
    ("ln_final.", "text tower"),
    ("attn_mask", "text tower"),
    ("logit_scale", "contrastive loss"),
    ("logit_bias", "contrastive loss"),
    ("input_resolution", "sizes stored as numbers"),
    ("context_length", "sizes stored as numbers"),
    ("vocab_size", "sizes stored as numbers"),
    ("embeddings.position_ids", "position ids"),
    ("embeddings.mask_token", "mask token of the pre-training"),
    ("mask_token", "mask token of the pre-training"),
    ("masked_embed", "mask token of the pre-training"),
    ("decoder_", "decoder of the pre-training"),
    ("dec_norms.", "decoder of the pre-training"),
    ("wfm.", "decoder of the pre-training"),
    ("decoder.", "decoder of the pre-training"),
    ("head.mlp.", "head of the self-distillation"),
    ("head.last_layer.", "head of the self-distillation"),
    ("dino_head.", "head of the self-distillation"),
    ("ibot_head.", "head of the self-distillation"),
    ("pooler.", "pooler"),
    ("classifier.", "classifier"),
    ("clip_model.", "frozen teacher"),
    ("dino_model.", "frozen teacher"),
    ("distill_weights", "alignment of the pre-training"),
    ("distill_heads.", "alignment of the pre-training"),
    ("fc_norm.", "classifier"),
    ("head.", "classifier"),
];

/// As [`OUTSIDE`], for names beside a `visual.` tower, where the text tower has names that a vision tower has too.
const BESIDE_VISUAL: &[(&str, &str)] =
    &[("transformer.", "text tower"), ("positional_embedding", "text tower"), ("cls_emb", "text tower")];

/// Blocks beyond this number are taken for names that are not understood.
const MAX_BLOCKS: usize = 1024;

/// Renames a file's tensors to the one naming, fuses query, key and value, and turns what is stored turned.
///
/// The naming is found by its marks, whatever stands before all of a tower's names (`model.`, `module.`, `backbone.`,
/// `visual.`, ...) or between them (torch.compile's `_orig_mod.`). Blocks may be numbered in chunks. Of several towers those of
/// `family` count, of these a teacher's before a student's, and then the one with the shortest prefix; the others are left
/// out. `family` says what is expected: a file of another family is refused with the name it goes by.
///
/// # Errors
/// One error with every tensor that is missing, not understood, misshapen (against the file's own width) or not finite.
/// The final norm and the projection are not required here: [`super::check_against`] knows what a model needs.
pub fn to_canonical(map: TensorMap, family: Family) -> Result<Canonical, WeightsError> {
    let what = format!("weights of family {}", family.name());
    let map = unwrapped(map);
    let found = detect(&map, family, &what)?;
    let Found { naming, prefix, .. } = &found;
    let what = format!("{what} (in {} naming)", naming.name);

    let mut canonical = Canonical {
        tensors: TensorMap::new(),
        mask_token: None,
        naming: naming.name,
        prefix: prefix.clone(),
        others: found.others.clone(),
        ignored: Vec::new(),
    };
    canonical.mask_token = mask_token(&map, &found);
    let mut thirds: BTreeMap<String, [Option<HostTensor>; 3]> = BTreeMap::new();
    let mut mismatch = Mismatch::default();
    for (name, tensor) in map {
        match fate(&name, &found, family) {
            Fate::Tower(ours, Third(part)) => thirds.entry(ours).or_default()[part] = Some(tensor),
            Fate::Tower(ours, change) => match changed(tensor, change) {
                Ok(tensor) => {
                    canonical.tensors.insert(ours, tensor);
                }
                Err(shape) => mismatch.misshapen.push((name, shape, "another rank".into())),
            },
            Fate::Ignored(rule) => canonical.ignored.push((name, rule)),
            Fate::Unknown => mismatch.extra.push(name),
        }
    }
    for (ours, parts) in thirds {
        fuse(ours, parts, naming, prefix, &mut canonical.tensors, &mut mismatch);
    }
    leave_out_zero_biases(&mut canonical, family);
    look_for_missing(&canonical.tensors, family, naming, prefix, &mut mismatch);
    // A tensor goes by the file's name for it; one fused from three by ours.
    let file_name = |ours: &str| match their_names(ours, naming).as_slice() {
        [(theirs, _)] => format!("{prefix}{theirs}"),
        _ => ours.to_owned(),
    };
    look_at_shapes(&canonical.tensors, file_name, &mut mismatch);
    for (ours, tensor) in &canonical.tensors {
        mismatch.look_for_non_finite(&file_name(ours), tensor);
    }
    mismatch.into_result(&what)?;
    Ok(canonical)
}

/// The tensors under names without the parts that programs put around modules, LayerScale's under timm's. Where two would
/// share a name, the file's own names stay.
pub(super) fn unwrapped(map: TensorMap) -> TensorMap {
    let plain = |name: &str| -> String {
        let parts = name.split('.').filter(|part| !WRAPPED.contains(part));
        parts.map(timms_scale).collect::<Vec<_>>().join(".")
    };
    let names: BTreeSet<String> = map.keys().map(|name| plain(name)).collect();
    match names.len() == map.len() {
        true => map.into_iter().map(|(name, tensor)| (plain(&name), tensor)).collect(),
        false => map,
    }
}

/// timm's name of LayerScale's vectors, for a part of a name that is theirs; every other part as it is.
fn timms_scale(part: &str) -> &str {
    SCALES.iter().find(|(theirs, _)| *theirs == part).map_or(part, |(_, ours)| ours)
}

/// The mask token of a tower. That of a file with a decoder is the decoder's, whatever its width.
fn mask_token(map: &TensorMap, found: &Found) -> Option<HostTensor> {
    let mut inner = map.keys().filter_map(|name| name.strip_prefix(found.prefix.as_str()));
    if inner.any(|name| name.starts_with("decoder_") || name.starts_with("decoder.")) {
        return None;
    }
    let token = MASK_TOKENS.iter().find_map(|name| map.get(&format!("{}{name}", found.prefix)))?;
    let (patch, _) = their_names("patch_embed.proj.weight", found.naming).into_iter().next()?;
    let width = *map.get(&format!("{}{patch}", found.prefix))?.shape.first()?;
    let is_one = token.shape.last() == Some(&width) && element_count(&token.shape) == Some(width);
    is_one.then(|| HostTensor { shape: vec![1, 1, width], ..token.clone() })
}

/// The tower that is read.
struct Found {
    naming: &'static Naming,
    /// What stands before its names.
    prefix: String,
    /// What stands before the names of the file's other towers.
    others: Vec<String>,
    /// The block that each numbering in the file means.
    blocks: BTreeMap<Vec<usize>, usize>,
}

/// The naming, what stands before it, and how blocks are numbered.
fn detect(map: &TensorMap, family: Family, what: &str) -> Result<Found, WeightsError> {
    let mut towers: Vec<(&'static Naming, &str)> = Vec::new();
    for &naming in namings() {
        let has_blocks = |prefix: &str| {
            let start = format!("{prefix}{}", naming.blocks);
            map.range(start.clone()..).next().is_some_and(|(name, _)| name.starts_with(&start))
        };
        let has_second = |prefix: &str| match naming.second_mark {
            Some(mark) => map.contains_key(&format!("{prefix}{mark}")),
            None => true,
        };
        let prefixes = map.keys().filter_map(|name| name.strip_suffix(naming.mark));
        let prefixes = prefixes.filter(|prefix| prefix.is_empty() || prefix.ends_with('.'));
        for prefix in prefixes.filter(|prefix| has_blocks(prefix) && has_second(prefix)) {
            // Where two namings fit one tower, the first counts.
            if !towers.iter().any(|(_, other)| *other == prefix) {
                towers.push((naming, prefix));
            }
        }
    }
    let refuse = |reason: String| WeightsError::Layout { what: what.to_owned(), reason: visible_lines(&reason) };
    // The student of a self-distillation is worth less than its teacher.
    let best = towers.iter().copied().min_by_key(|&(naming, prefix)| {
        let of_student = prefix.split('.').any(|part| part == "student");
        (!Structure::of(map, naming, prefix).fits(family), of_student, prefix.len(), prefix)
    });
    let Some((naming, prefix)) = best else {
        let known = namings().iter().map(|naming| format!("{} (has `{}`)", naming.name, naming.mark));
        let known = known.collect::<Vec<_>>().join(", ");
        let there: Vec<_> = map.keys().take(5).map(|name| format!("`{name}`")).collect();
        let there = if there.is_empty() { "nothing".to_owned() } else { there.join(", ") };
        return Err(refuse(format!(
            "no vision transformer is found among {} tensors ({there}, ...); known namings: {known}",
            map.len()
        )));
    };
    let structure = Structure::of(map, naming, prefix);
    if !structure.fits(family) {
        let (name, actual) = (naming.name, structure.family());
        let reason = format!("the file holds a tower of another family ({name} naming); use `type: {actual}`");
        return Err(refuse(reason));
    }
    if ["reg_token", "embeddings.register_tokens"].iter().any(|name| map.contains_key(&format!("{prefix}{name}"))) {
        return Err(refuse("the tower has register tokens, which are not supported; use weights without them".into()));
    }
    if ["dist_token", "embeddings.distillation_token"].iter().any(|name| map.contains_key(&format!("{prefix}{name}"))) {
        return Err(refuse(
            "the tower has a distillation token (`dist_token`), a second class token that is not supported; use the \
             weights that were trained without distillation"
                .into(),
        ));
    }
    let others = towers.iter().map(|(_, other)| (*other).to_owned()).filter(|other| other != prefix).collect();
    let blocks = numbering(map.keys().filter_map(|name| name.strip_prefix(prefix)), naming);
    Ok(Found { naming, prefix: prefix.to_owned(), others, blocks })
}

/// What tells a tower's family.
struct Structure {
    is_clip: bool,
    has_scales: bool,
}

impl Structure {
    fn of(map: &TensorMap, naming: &Naming, prefix: &str) -> Structure {
        let holds = |ours: &str| {
            their_names(ours, naming).iter().any(|(theirs, _)| map.contains_key(&format!("{prefix}{theirs}")))
        };
        let of_clip_alone = !naming.families.contains(&Family::Vit) && naming.families.contains(&Family::Clip);
        Structure {
            is_clip: of_clip_alone || holds("norm_pre.weight"),
            has_scales: naming.families == [Family::Dinov2] || holds("blocks.0.ls1.gamma"),
        }
    }

    fn fits(&self, family: Family) -> bool {
        match family {
            Family::Clip => self.is_clip,
            Family::Dinov2 => !self.is_clip && self.has_scales,
            Family::Dino | Family::Vit => !self.is_clip && !self.has_scales,
        }
    }

    /// The teachers' types that take such a tower.
    fn family(&self) -> &'static str {
        match (self.is_clip, self.has_scales) {
            (true, _) => "clip",
            (false, true) => "dinov2",
            (false, false) => "vit` or `dino",
        }
    }
}

/// The block that each numbering among a tower's names means. A number is a block's own; two stand for a chunk and a block
/// in it, counted through all chunks (DINOv2's `block_chunks`) or anew in each (nested sequences).
fn numbering<'a>(names: impl Iterator<Item = &'a str>, naming: &Naming) -> BTreeMap<Vec<usize>, usize> {
    let all: BTreeSet<Vec<usize>> = names.filter_map(|name| Some(numbers(name, naming)?.0)).collect();
    let last: BTreeSet<usize> = all.iter().filter_map(|numbers| numbers.last().copied()).collect();
    let counted_through = last.len() == all.len();
    all.into_iter()
        .enumerate()
        .map(|(place, numbers)| {
            let own = numbers.last().copied().filter(|_| counted_through);
            (numbers, own.unwrap_or(place))
        })
        .collect()
}

/// The numbers of a block's tensor, and what stands behind them.
fn numbers<'a>(name: &'a str, naming: &Naming) -> Option<(Vec<usize>, &'a str)> {
    let mut rest = name.strip_prefix(naming.blocks)?;
    let mut numbers = Vec::new();
    while let Some((number, behind)) = rest.split_once('.')
        && let Ok(number) = number.parse()
    {
        if number >= MAX_BLOCKS {
            return None;
        }
        numbers.push(number);
        rest = behind;
    }
    (!numbers.is_empty()).then_some((numbers, rest))
}

/// What becomes of a tensor.
enum Fate {
    Tower(String, Change),
    Ignored(&'static str),
    Unknown,
}

fn fate(name: &str, found: &Found, family: Family) -> Fate {
    let Found { naming, prefix, .. } = found;
    if let Some(inner) = name.strip_prefix(prefix.as_str())
        && let Some((ours, change)) = tower_name(inner, found)
    {
        return Fate::Tower(ours, change);
    }
    // What is beside the tower may stand under any part of the prefix.
    let ends = std::iter::once(0).chain(prefix.match_indices('.').map(|(at, _)| at + 1));
    let inner_first: Vec<&str> = ends.filter_map(|end| name.strip_prefix(&prefix[..end])).collect();
    for inner in inner_first.into_iter().rev() {
        if family == Family::Clip && matches!(inner, "head.weight" | "head.proj.weight" | "visual_projection.weight") {
            return Fate::Tower("head.weight".into(), Same);
        }
        if family == Family::Clip && inner == "head.bias" {
            return Fate::Tower("head.bias".into(), Same);
        }
        let fits = |pattern: &str| match pattern.ends_with(['.', '_']) {
            true => inner.starts_with(pattern),
            false => inner == pattern,
        };
        let beside: &[_] = match prefix.contains("visual.") && !name.starts_with(prefix.as_str()) {
            true => BESIDE_VISUAL,
            false => &[],
        };
        if let Some((_, rule)) = naming.beside.iter().chain(OUTSIDE).chain(beside).find(|(pattern, _)| fits(pattern)) {
            return Fate::Ignored(rule);
        }
    }
    let of_student = |name: &str| name.split('.').any(|part| part == "student");
    if of_student(name) && !of_student(prefix) && !prefix.is_empty() {
        return Fate::Ignored("student of the self-distillation");
    }
    // Another tower's prefix may begin as this one's: `model.` and `model.ema.`.
    let other = |prefix: &String| name.starts_with(prefix.as_str()) && prefix.len() > found.prefix.len();
    let elsewhere = !name.starts_with(prefix.as_str());
    if found.others.iter().any(|prefix| other(prefix) || elsewhere && name.starts_with(prefix.as_str())) {
        return Fate::Ignored("another tower");
    }
    Fate::Unknown
}

/// Our name of a tower's tensor, given what stands behind the prefix.
fn tower_name(name: &str, found: &Found) -> Option<(String, Change)> {
    if let Some(renamed) = rename(name, found.naming.tower) {
        return Some(renamed);
    }
    let (numbers, rest) = numbers(name, found.naming)?;
    let (ours, change) = rename(rest, found.naming.block)?;
    Some((format!("blocks.{}.{ours}", found.blocks.get(&numbers)?), change))
}

fn rename(name: &str, rows: &[Row]) -> Option<(String, Change)> {
    rows.iter().find_map(|(theirs, ours, change)| match theirs.strip_suffix('*') {
        None => (name == *theirs).then(|| ((*ours).to_owned(), *change)),
        Some(stem) => {
            let kind = name.strip_prefix(stem).filter(|kind| ["weight", "bias"].contains(kind))?;
            Some((ours.replace('*', kind), *change))
        }
    })
}

/// Their names of a tensor of ours; three where it is in thirds there, none where they have no such tensor.
fn their_names(ours: &str, naming: &Naming) -> Vec<(String, Change)> {
    let (stem, rest, rows) = match ours.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')) {
        Some((number, rest)) => (format!("{}{number}.", naming.blocks), rest, naming.block),
        None => (String::new(), ours, naming.tower),
    };
    rows.iter()
        .filter_map(|(theirs, ours, change)| {
            let theirs = match ours.strip_suffix('*') {
                None => (rest == *ours).then(|| (*theirs).to_owned())?,
                Some(ours) => {
                    let kind = rest.strip_prefix(ours).filter(|kind| ["weight", "bias"].contains(kind))?;
                    theirs.replace('*', kind)
                }
            };
            Some((format!("{stem}{theirs}"), *change))
        })
        .collect()
}

/// Applies a change of one tensor; its shape comes back where that cannot be.
fn changed(mut tensor: HostTensor, change: Change) -> Result<HostTensor, Vec<usize>> {
    match change {
        Same | Third(_) => Ok(tensor),
        ToRank(rank) => {
            if tensor.shape.len() > rank {
                return Err(tensor.shape);
            }
            tensor.shape.splice(0..0, std::iter::repeat_n(1, rank - tensor.shape.len()));
            Ok(tensor)
        }
        Transposed => {
            let &[rows, columns] = tensor.shape.as_slice() else {
                return Err(tensor.shape);
            };
            if tensor.is_shape_only() {
                return Ok(HostTensor::shape_only(vec![columns, rows]));
            }
            Ok(HostTensor { shape: vec![columns, rows], data: transposed(&tensor.data, rows, columns) })
        }
    }
}

/// Puts query, key and value one after the other.
fn fuse(
    ours: String,
    parts: [Option<HostTensor>; 3],
    naming: &Naming,
    prefix: &str,
    tensors: &mut TensorMap,
    mismatch: &mut Mismatch,
) {
    let names: Vec<_> = their_names(&ours, naming).into_iter().map(|(name, _)| format!("{prefix}{name}")).collect();
    let shape = parts.iter().flatten().next().map(|part| part.shape.clone()).unwrap_or_default();
    let mut data = Vec::with_capacity(parts.iter().flatten().map(|part| part.data.len()).sum());
    let mut whole = !shape.is_empty();
    for (part, name) in parts.into_iter().zip(names) {
        match part {
            None => {
                mismatch.missing.push(name);
                whole = false;
            }
            Some(part) if part.shape != shape => {
                mismatch.misshapen.push((name, part.shape, format!("{shape:?}")));
                whole = false;
            }
            Some(part) => data.extend(part.data),
        }
    }
    if whole {
        let mut shape = shape;
        shape[0] *= 3;
        tensors.insert(ours, HostTensor { shape, data });
    }
}

/// timm gives CLIP a projection's bias that CLIP does not have, full of zeros; of a shape alone nothing is said.
fn leave_out_zero_biases(canonical: &mut Canonical, family: Family) {
    if family != Family::Clip {
        return;
    }
    for name in ["head.bias", "patch_embed.proj.bias"] {
        if canonical.tensors.get(name).is_some_and(|bias| bias.data.iter().all(|value| *value == 0.0)) {
            canonical.tensors.remove(name);
            canonical.ignored.push((name.to_owned(), "bias that CLIP does not have, all zero"));
        }
    }
    canonical.ignored.sort();
}

/// The tensors each block of a tower has.
fn block_names(family: Family) -> impl Iterator<Item = String> {
    let pairs = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"];
    let scales: &[&str] = if family == Family::Dinov2 { &["ls1.gamma", "ls2.gamma"] } else { &[] };
    pairs
        .into_iter()
        .flat_map(|stem| [format!("{stem}.weight"), format!("{stem}.bias")])
        .chain(scales.iter().map(|name| (*name).to_owned()))
}

/// The tensors that every tower of a family has, for as many blocks as `tensors` begins; the final norm is not among
/// them.
fn needed_names(tensors: &TensorMap, family: Family) -> impl Iterator<Item = String> {
    let depth = tensors.keys().filter_map(|name| block_number(name)).max().map_or(1, |last| last + 1);
    let beside: &[&str] = match family {
        Family::Clip => &["cls_token", "norm_pre.weight", "norm_pre.bias"],
        // A student's tower has LayerScale and may have no class token; a tower that needs one refuses weights without.
        Family::Dino => &["cls_token", "patch_embed.proj.bias"],
        Family::Dinov2 | Family::Vit => &["patch_embed.proj.bias"],
    };
    let all = ["patch_embed.proj.weight", "pos_embed"].into_iter().chain(beside.iter().copied()).map(str::to_owned);
    all.chain((0..depth).flat_map(move |block| block_names(family).map(move |name| format!("blocks.{block}.{name}"))))
}

fn look_for_missing(tensors: &TensorMap, family: Family, naming: &Naming, prefix: &str, mismatch: &mut Mismatch) {
    let already: BTreeSet<String> = mismatch.missing.iter().cloned().collect();
    let misshapen: BTreeSet<String> = mismatch.misshapen.iter().map(|(name, ..)| name.clone()).collect();
    for ours in needed_names(tensors, family).filter(|name| !tensors.contains_key(name)) {
        let theirs: Vec<_> =
            their_names(&ours, naming).into_iter().map(|(name, _)| format!("{prefix}{name}")).collect();
        if theirs.iter().any(|name| already.contains(name) || misshapen.contains(name)) {
            continue;
        }
        mismatch.missing.extend(theirs);
    }
}

fn block_number(name: &str) -> Option<usize> {
    name.strip_prefix("blocks.")?.split_once('.')?.0.parse().ok()
}

/// Holds shapes against the width that the patch embedding gives and the first block's hidden width.
fn look_at_shapes(tensors: &TensorMap, file_name: impl Fn(&str) -> String, mismatch: &mut Mismatch) {
    let mut refuse = |name: &str, shape: &[usize], needed: String| {
        mismatch.misshapen.push((file_name(name), shape.to_vec(), needed));
    };
    let Some(patch) = tensors.get("patch_embed.proj.weight") else {
        return;
    };
    let &[width, _, side, other_side] = patch.shape.as_slice() else {
        return refuse("patch_embed.proj.weight", &patch.shape, "[width, 3, patch, patch]".into());
    };
    if width == 0 || side != other_side {
        return refuse("patch_embed.proj.weight", &patch.shape, "[width, 3, patch, patch]".into());
    }
    let hidden = tensors.get("blocks.0.mlp.fc1.weight").and_then(|tensor| tensor.shape.first().copied());
    for (name, tensor) in tensors {
        let shape = tensor.shape.as_slice();
        let inner = match name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')) {
            Some((_, inner)) => inner,
            None => name,
        };
        let hidden = hidden.unwrap_or_default();
        let needed = match inner {
            "patch_embed.proj.weight" | "head.bias" => continue,
            "cls_token" => vec![1, 1, width],
            "pos_embed" => {
                let rows = element_count(shape).map_or(0, |count| count / width);
                vec![1, rows, width]
            }
            "head.weight" => vec![shape.first().copied().unwrap_or_default(), width],
            "attn.qkv.weight" => vec![3 * width, width],
            "attn.qkv.bias" => vec![3 * width],
            "attn.proj.weight" => vec![width, width],
            "mlp.fc1.weight" => vec![hidden, width],
            "mlp.fc1.bias" => vec![hidden],
            "mlp.fc2.weight" => vec![width, hidden],
            _ => vec![width],
        };
        if shape != needed {
            refuse(name, shape, format!("{needed:?}"));
        }
    }
}

/// A classifier's tensors, CLIP's projection among them.
const CLASSIFIER: [&str; 4] = ["head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"];

/// Renames canonical tensors to another naming, the inverse of [`to_canonical`]. A classifier's `head.*` and `fc_norm.*`
/// may be among them where the naming is timm's.
///
/// # Errors
/// A tower of another family than the naming's, or tensors that the naming has no place for, all named.
pub fn to_family(map: &TensorMap, naming: &Naming) -> Result<TensorMap, WeightsError> {
    let mut renamed = TensorMap::new();
    let mut mismatch = Mismatch::default();
    if let Some(family) = naming.model {
        // These are no naming of any tower, as timm's is, but of one model: it has all of this and nothing else.
        let always = ["cls_token", "norm.weight", "norm.bias"].map(str::to_owned);
        let needed: BTreeSet<String> = needed_names(map, family).chain(always).collect();
        mismatch.missing.extend(needed.into_iter().filter(|name| !map.contains_key(name)));
        let patch_bias = "patch_embed.proj.bias";
        if family == Family::Clip && map.contains_key(patch_bias) {
            mismatch.extra.push(patch_bias.to_owned());
        }
    }
    // timm's pooled classifiers have a norm after the pooling in place of the one before it.
    let classifies = naming.writes == Writes::Classifier;
    let pooled = classifies && map.contains_key("fc_norm.weight");
    // A mask token is of use to pre-training alone.
    let left_out = |ours: &str| ours == "mask_token" || (pooled && ours.starts_with("norm."));
    for (ours, tensor) in map.iter().filter(|(ours, _)| !left_out(ours)) {
        let theirs = match classifies && CLASSIFIER.contains(&ours.as_str()) {
            true => vec![(ours.clone(), Same)],
            false => their_names(ours, naming),
        };
        if theirs.is_empty() {
            mismatch.extra.push(ours.clone());
        }
        let without_class = (classifies && ours == "pos_embed" && !map.contains_key("cls_token"))
            .then(|| without_class_row(tensor))
            .flatten();
        let tensor = without_class.as_ref().unwrap_or(tensor);
        for (name, change) in theirs {
            // The projection is beside Hugging Face's vision tower, not in it.
            let name = if name == "visual_projection.weight" { name } else { format!("{}{name}", naming.prefix) };
            match reverted(tensor, change) {
                Some(tensor) => {
                    renamed.insert(name, tensor);
                }
                None => mismatch.misshapen.push((ours.clone(), tensor.shape.clone(), "another rank".into())),
            }
        }
    }
    mismatch.into_result(&format!("tensors to be written in {} naming", naming.name))?;
    Ok(renamed)
}

/// Undoes a change; `None` where the shape does not allow it.
fn reverted(tensor: &HostTensor, change: Change) -> Option<HostTensor> {
    match change {
        Same => Some(tensor.clone()),
        ToRank(_) => {
            let ones = tensor.shape.iter().take_while(|length| **length == 1).count();
            Some(HostTensor { shape: tensor.shape[ones..].to_vec(), data: tensor.data.clone() })
        }
        Transposed => changed(tensor.clone(), Transposed).ok(),
        Third(part) => {
            let rows = tensor.shape.first().copied().filter(|rows| rows % 3 == 0)?;
            let mut shape = tensor.shape.clone();
            shape[0] = rows / 3;
            let length = tensor.data.len() / 3;
            Some(HostTensor { shape, data: tensor.data[part * length..(part + 1) * length].to_vec() })
        }
    }
}
