//! The parts of a case file, taken out one by one.

use std::collections::BTreeMap;

use maskalign_core::{
    ImageBatch,
    components::{maskers::Mask, tokens::Masks},
    weights::{HostTensor, TensorFile, TensorMap},
};

/// What is wrong with a file that should be a case.
#[derive(Debug)]
pub(super) struct Malformed(pub String);

/// What of a file has not been taken yet.
pub(super) struct Parts {
    metadata: BTreeMap<String, String>,
    tensors: TensorMap,
}

impl Parts {
    pub(super) fn of(file: TensorFile) -> maskalign_core::error::Result<Self> {
        Ok(Parts { metadata: file.metadata().into_iter().collect(), tensors: file.read_all()? })
    }

    /// A text of the header.
    pub(super) fn metadata(&mut self, name: &str) -> Result<String, Malformed> {
        self.metadata.remove(name).ok_or_else(|| Malformed(format!("its metadata has no `{name}`")))
    }

    /// As [`Parts::metadata`], where it may be absent.
    pub(super) fn note(&mut self, name: &str) -> Option<String> {
        self.metadata.remove(name)
    }

    pub(super) fn take(&mut self, name: &str) -> Result<HostTensor, Malformed> {
        self.tensors.remove(name).ok_or_else(|| Malformed(format!("no tensor `{name}`")))
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensors whose names begin with `prefix`, without it.
    pub(super) fn under(&mut self, prefix: &str) -> TensorMap {
        let names: Vec<String> = self.tensors.keys().filter(|name| name.starts_with(prefix)).cloned().collect();
        let take = |name: String| (name[prefix.len()..].to_owned(), self.tensors.remove(&name).expect("listed"));
        names.into_iter().map(take).collect()
    }

    /// The name of a tensor that nobody took.
    pub(super) fn left(&self) -> Option<&str> {
        self.tensors.keys().next().map(String::as_str)
    }

    /// Images: those of every step, `[steps, B, 3, side, side]`, or the same in each, `[B, 3, side, side]`.
    pub(super) fn images(&mut self, name: &str) -> Result<Vec<ImageBatch>, Malformed> {
        let HostTensor { shape, data } = self.take(name)?;
        let (batch, size) = match shape[..] {
            [batch, 3, height, width] | [_, batch, 3, height, width] if height == width => (batch, height),
            _ => {
                let text = format!("`{name}` is {shape:?}, neither [B, 3, side, side] nor [steps, B, 3, side, side]");
                return Err(Malformed(text));
            }
        };
        if data.is_empty() {
            return Err(Malformed(format!("`{name}` is {shape:?}: it has no pixel")));
        }
        let of = |pixels: &[f32]| ImageBatch { pixels: pixels.to_vec(), batch, size };
        Ok(data.chunks_exact(batch * 3 * size * size).map(of).collect())
    }

    /// Patches of each image of each step, `[steps, B, K]`; -1 is none, for images that have fewer than others.
    pub(super) fn ids(&mut self, name: &str) -> Result<Ids, Malformed> {
        let HostTensor { shape, data } = self.take(name)?;
        let [steps, batch, each] = shape[..] else {
            return Err(Malformed(format!("`{name}` is {shape:?}, not [steps, B, K]")));
        };
        if data.is_empty() {
            return Err(Malformed(format!("`{name}` is {shape:?}: it names no patch")));
        }
        // Larger ones are not exact.
        if let Some(id) = data.iter().find(|&&id| !(-1.0..16_777_216.0).contains(&id) || id.fract() != 0.0) {
            return Err(Malformed(format!("`{name}` holds {id}, a patch that an image does not have")));
        }
        let values = data.chunks_exact(each);
        let values = values.map(|ids| ids.iter().filter(|id| **id >= 0.0).map(|id| *id as u32).collect()).collect();
        Ok(Ids { name: name.to_owned(), steps, batch, each, values })
    }
}

/// Patches of each image of each step.
pub(super) struct Ids {
    name: String,
    pub(super) steps: usize,
    pub(super) batch: usize,
    pub(super) each: usize,
    /// Of each image of each step.
    values: Vec<Vec<u32>>,
}

/// The masks of each step, of images with so many patches: what one side does not name is on the other. Masked patches come in
/// so many blocks, and may be in several of them.
pub(super) fn masks(
    visible: Option<&Ids>,
    masked: Option<&Ids>,
    patches: usize,
    blocks: usize,
) -> Result<Vec<Masks>, Malformed> {
    let Some(Ids { steps, batch, .. }) = visible.or(masked) else { return Ok(Vec::new()) };
    let images = (0..steps * batch).map(|image| {
        // Where a patch was named last; a block counts as a place.
        let mut named: Vec<Option<(bool, usize)>> = vec![None; patches];
        for (ids, is_masked) in visible.iter().map(|ids| (ids, false)).chain(masked.iter().map(|ids| (ids, true))) {
            let each = if is_masked { ids.each / blocks } else { ids.each };
            for (place, &id) in ids.values[image].iter().enumerate() {
                let Some(last) = named.get_mut(id as usize) else {
                    let text = format!("`{}` holds {id}, a patch that an image does not have", ids.name);
                    return Err(Malformed(text));
                };
                let at = (is_masked, place / each.max(1));
                if last.replace(at).is_some_and(|last| last == at || !last.0) {
                    return Err(Malformed(format!("`{}` names a patch twice: {id}", ids.name)));
                }
            }
        }
        let others: Vec<u32> = (0..patches as u32).filter(|&id| named[id as usize].is_none()).collect();
        let side = |ids: Option<&Ids>| ids.map_or_else(|| others.clone(), |ids| ids.values[image].clone());
        Ok((side(visible), side(masked)))
    });
    let images: Vec<(Vec<u32>, Vec<u32>)> = images.collect::<Result<_, _>>()?;
    let step = |images: &[(Vec<u32>, Vec<u32>)]| {
        let mask = |(visible, masked): &(Vec<u32>, Vec<u32>)| Mask { visible: visible.clone(), masked: masked.clone() };
        Masks::join(&images.iter().map(mask).collect::<Vec<_>>())
    };
    Ok(images.chunks_exact(*batch).map(step).collect())
}
