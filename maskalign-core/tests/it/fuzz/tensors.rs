//! Safetensors files in parts, to be edited and put together again with lengths and checksums that fit.

use serde_json::{Map, Value, json};

use super::{
    edited, little,
    run::{Random, any_decimal, any_number},
};

/// The metadata of a checkpoint.
pub(super) const CHECKPOINT: &str = "maskalign-checkpoint-v2";
/// The most values that an edit makes of a shape.
const MOST_VALUES: u64 = 4096;

#[derive(Clone)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: String,
    pub(super) shape: Vec<u64>,
    pub(super) data: Vec<u8>,
}

/// A safetensors file in parts.
#[derive(Clone)]
pub(super) struct Parts {
    pub(super) metadata: Map<String, Value>,
    pub(super) entries: Vec<Entry>,
}

/// Bytes of a number.
fn size_of(dtype: &str) -> u64 {
    match dtype {
        "F64" | "I64" | "U64" => 8,
        "F32" | "I32" | "U32" => 4,
        "F16" | "BF16" | "I16" | "U16" => 2,
        _ => 1,
    }
}

impl Parts {
    /// The parts of a file; `None` where the header is not understood.
    pub(super) fn of(bytes: &[u8]) -> Option<Parts> {
        let length = little(bytes, 0, 8)?;
        let header: Map<String, Value> = serde_json::from_slice(bytes.get(8..length.checked_add(8)?)?).ok()?;
        let data = &bytes[8 + length..];
        let mut parts = Parts { metadata: Map::new(), entries: Vec::new() };
        for (name, value) in header {
            if name == "__metadata__" {
                parts.metadata.clone_from(value.as_object()?);
                continue;
            }
            let number = |value: &Value| value.as_u64();
            let offsets: Vec<u64> = value["data_offsets"].as_array()?.iter().map(number).collect::<Option<_>>()?;
            let &[start, end] = &offsets[..] else { return None };
            parts.entries.push(Entry {
                name,
                dtype: value["dtype"].as_str()?.to_owned(),
                shape: value["shape"].as_array()?.iter().map(number).collect::<Option<_>>()?,
                data: data.get(start as usize..end as usize).unwrap_or_default().to_vec(),
            });
        }
        Some(parts)
    }

    /// The file, its tensors one after the other.
    pub(super) fn file(&self) -> Vec<u8> {
        let mut header = Map::new();
        if !self.metadata.is_empty() {
            header.insert("__metadata__".into(), self.metadata.clone().into());
        }
        let mut data = Vec::new();
        for entry in &self.entries {
            let start = data.len();
            data.extend(&entry.data);
            let offsets = [start, data.len()];
            let value = json!({ "dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets });
            header.insert(entry.name.clone(), value);
        }
        let header = Value::Object(header).to_string();
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
    }

    /// The checksum of a checkpoint, as its format is described: over the header's text, and over names, shapes and values
    /// of all tensors, sorted by name.
    pub(super) fn digest(&self, text: &str) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(text.as_bytes());
        let mut entries: Vec<&Entry> = self.entries.iter().collect();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        for entry in entries {
            hasher.update(&(entry.name.len() as u64).to_le_bytes());
            hasher.update(entry.name.as_bytes());
            hasher.update(&(entry.shape.len() as u64).to_le_bytes());
            for length in &entry.shape {
                hasher.update(&length.to_le_bytes());
            }
            hasher.update(&entry.data);
        }
        hasher.finalize().to_hex().to_string()
    }

    /// The checksum that a checkpoint has, and the text after it.
    pub(super) fn sealed(&self) -> Option<(&str, &str)> {
        self.metadata.get(CHECKPOINT)?.as_str()?.split_once(' ')
    }

    /// Makes the checksum right, where there is one.
    pub(super) fn seal(&mut self) {
        if let Some((_, text)) = self.sealed() {
            let sealed = format!("{} {text}", self.digest(text));
            self.metadata.insert(CHECKPOINT.into(), sealed.into());
        }
    }

    /// Gives a tensor another shape, and zeros where there are not enough values.
    fn reshape(&mut self, at: usize, shape: Vec<u64>) {
        let entry = &mut self.entries[at];
        let values = shape.iter().try_fold(1u64, |product, &length| product.checked_mul(length));
        if let Some(values) = values.filter(|values| *values <= MOST_VALUES) {
            entry.data.resize((values * size_of(&entry.dtype)) as usize, 0);
        }
        entry.shape = shape;
    }

    /// Edits names, shapes, kinds of numbers and values, as programs do that write other files of the same tower.
    pub(super) fn edit(&mut self, random: &mut Random) -> Option<()> {
        const PREFIXES: [&str; 9] = [
            "module.",
            "model.",
            "visual.",
            "teacher.",
            "student.",
            "backbone.",
            "_orig_mod.",
            "\u{1b}[31m.",
            "a.b.c.",
        ];
        const NAMES: [&str; 10] = [
            "cls_token",
            "dist_token",
            "reg_token",
            "head.weight",
            "head.bias",
            "norm_pre.weight",
            "mask_token",
            "pos_embed",
            "blocks.0.ls1.gamma",
            "patch_embed.proj.weight",
        ];
        const TYPES: [&str; 15] = [
            "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "F8_E4M3", "F4",
        ];
        let at = random.below(self.entries.len());
        let entry = self.entries.get(at)?.clone();
        match random.below(14) {
            0 => {
                self.entries.remove(at);
            }
            1 => {
                let prefix = *random.pick(&PREFIXES);
                self.entries.iter_mut().for_each(|entry| entry.name.insert_str(0, prefix));
            }
            2 => self.entries[at].name.insert_str(0, random.pick::<&str>(&PREFIXES)),
            3 => {
                // The whole tower once more, under another name.
                let prefix = *random.pick(&PREFIXES);
                let copies: Vec<Entry> = self
                    .entries
                    .iter()
                    .map(|entry| Entry { name: format!("{prefix}{}", entry.name), ..entry.clone() })
                    .collect();
                self.entries.extend(copies);
            }
            4 => (*random.pick(&NAMES)).clone_into(&mut self.entries[at].name),
            5 => {
                let parts: Vec<&str> = entry.name.split('.').collect();
                let place = random.below(parts.len());
                let mut parts: Vec<String> = parts.into_iter().map(str::to_owned).collect();
                parts[place] = match random.below(4) {
                    0 => any_decimal(random).to_owned(),
                    1 => "_orig_mod".into(),
                    2 => random.pick(&parts).clone(),
                    _ => String::new(),
                };
                self.entries[at].name = parts.join(".");
            }
            6 => {
                let name = edited(entry.name.as_bytes(), random);
                self.entries[at].name = String::from_utf8_lossy(&name).into_owned();
            }
            7 => {
                let mut shape = entry.shape;
                let side = random.below(shape.len());
                let length = shape.get_mut(side)?;
                *length = any_number(*length, 8, random);
                // Of no values at all, which any other side may go with.
                if random.one_in(3) {
                    shape.push(0);
                }
                self.reshape(at, shape);
            }
            8 => {
                let mut shape = entry.shape;
                match random.below(4) {
                    0 => shape.insert(0, 1),
                    1 => drop(shape.pop()),
                    2 => shape.reverse(),
                    _ => shape = vec![1; random.below(70)],
                }
                self.reshape(at, shape);
            }
            9 => {
                (*random.pick(&TYPES)).clone_into(&mut self.entries[at].dtype);
                if random.one_in(2) {
                    self.reshape(at, entry.shape);
                }
            }
            10 => {
                let value = *random.pick(&[f32::NAN, f32::INFINITY, f32::MAX, -0.0, 1e-45]);
                let place = random.below(entry.data.len() / 4) * 4;
                self.entries[at].data.get_mut(place..place + 4)?.copy_from_slice(&value.to_le_bytes());
            }
            11 => {
                let copy = Entry { name: format!("{}{}", entry.name, random.below(3)), ..entry };
                self.entries.push(copy);
            }
            12 => {
                let kept = self.metadata.get(CHECKPOINT).and_then(Value::as_str)?;
                let text = edited(kept.as_bytes(), random);
                self.metadata.insert(CHECKPOINT.into(), String::from_utf8_lossy(&text).into_owned().into());
            }
            _ => {
                let other = random.below(self.entries.len());
                let shape = self.entries[other].shape.clone();
                self.reshape(at, shape);
            }
        }
        Some(())
    }
}

/// An edit of a safetensors file.
pub(super) fn edit(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let mut parts = Parts::of(bytes)?;
    parts.edit(random)?;
    Some(parts.file())
}

/// Makes the header's length right, and a checkpoint's checksum.
pub(super) fn mend(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(length) = header_length(&bytes) {
        bytes[..8].copy_from_slice(&(length as u64).to_le_bytes());
    }
    match Parts::of(&bytes) {
        Some(mut parts) if parts.sealed().is_some() => {
            parts.seal();
            parts.file()
        }
        _ => bytes,
    }
}

/// The bytes up to the brace that closes the header.
fn header_length(bytes: &[u8]) -> Option<usize> {
    let (mut depth, mut is_text, mut is_escaped) = (0, false, false);
    for (at, byte) in bytes.get(8..)?.iter().enumerate() {
        match (byte, is_text) {
            _ if is_escaped => is_escaped = false,
            (b'\\', true) => is_escaped = true,
            (b'"', _) => is_text = !is_text,
            (b'{', false) => depth += 1,
            (b'}', false) => {
                depth -= 1;
                if depth == 0 {
                    return Some(at + 1);
                }
            }
            _ => {}
        }
    }
    None
}
