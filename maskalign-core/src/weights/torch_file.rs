//! PyTorch's `.pth`, `.pt` and `.bin`: a zip archive of one pickle and the storages it names; TorchScript archives too.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use zip::result::ZipError;
use zip::{CompressionMethod, ZipArchive};

use super::element::element_count;
use super::error::WeightsError;
use super::part::under;
use super::pickle::{Id, Node, Pickle, Storage, Tensor};
use super::tensor_file::MAX_NAME_BYTES;
use super::{HostTensor, TensorMap};

/// A pickle holds names and sizes only; a large model's, its optimizer's state included, is below a megabyte.
const MAX_PICKLE_BYTES: u64 = 16 << 20;
/// A pickle of more bytes than this describes tensors that are there: what it is parsed into takes many times its size.
const FREE_PICKLE_BYTES: u64 = 1 << 20;
const MAX_DEPTH: usize = 32;
/// So many of the dictionaries beside the weights are named.
const MAX_PASSED: usize = 16;
const MAX_VISITS: usize = 1 << 20;
/// Names and shapes may take so many bytes, or so many for each byte of the pickle: a pickle names a tensor as often as it
/// likes, and what is found is a copy each time.
const FREE_DESCRIPTION_BYTES: usize = 1 << 20;
const MAX_DESCRIPTION_PER_BYTE: usize = 32;
/// Keys under which training scripts keep the weights, the preferred one first. DINO's own evaluation takes the teacher.
const WRAPPERS: [&str; 6] = ["model", "state_dict", "model_state_dict", "teacher", "student", "module"];

type Archive = ZipArchive<BufReader<File>>;

/// Reads the weights of a PyTorch file, or those under `key` in it.
pub(super) fn read(path: &Path, key: Option<&str>) -> Result<TensorMap, WeightsError> {
    let Described { mut archive, folder, tensors, passed, file_bytes } = Described::open(path, key)?;
    if !passed.is_empty() {
        let (path, passed) = (path.display(), passed.join("`, `"));
        tracing::info!("{path}: other tensors are under `{passed}`; `weights: {{path: FILE, key: NAME}}` takes those");
    }
    load(&mut archive, &folder, tensors, file_bytes).map_err(|reason| WeightsError::format(path, reason))
}

/// Reads names and shapes, which the archive's pickle holds; its values are not looked at.
pub(super) fn read_shapes(path: &Path, key: Option<&str>) -> Result<TensorMap, WeightsError> {
    let tensors = Described::open(path, key)?.tensors;
    Ok(tensors.into_iter().map(|(name, tensor)| (name, HostTensor::shape_only(tensor.shape))).collect())
}

/// A PyTorch file whose tensors are known, values not yet.
struct Described {
    archive: Archive,
    /// What stands before every entry's name.
    folder: String,
    tensors: BTreeMap<String, Tensor>,
    /// Names of dictionaries of tensors beside those.
    passed: Vec<String>,
    file_bytes: u64,
}

impl Described {
    fn open(path: &Path, key: Option<&str>) -> Result<Described, WeightsError> {
        let format = |reason: String| WeightsError::format(path, reason);
        let file = File::open(path).map_err(|e| WeightsError::io(path, e))?;
        let file_bytes = file.metadata().map_err(|e| WeightsError::io(path, e))?.len();
        let zip = |error: ZipError| format(format!("the archive is truncated or damaged: {error}"));
        let mut archive = ZipArchive::new(BufReader::new(file)).map_err(zip)?;
        let folder = archive
            .file_names()
            .find_map(|name| Some(name.ok()?.strip_suffix("data.pkl")?.to_owned()))
            .ok_or_else(|| format("the archive holds no `data.pkl`: it is not a PyTorch file".into()))?;
        if let Ok(order) = entry(&mut archive, &format!("{folder}byteorder"), 16)
            && order != b"little"
        {
            return Err(format("its numbers are big-endian; save it anew on a little-endian machine".into()));
        }
        let bytes = entry(&mut archive, &format!("{folder}data.pkl"), MAX_PICKLE_BYTES).map_err(format)?;
        let pickled = bytes.len() as u64;
        if pickled > FREE_PICKLE_BYTES && pickled > file_bytes.saturating_sub(pickled) {
            let rest = file_bytes.saturating_sub(pickled);
            return Err(format(format!(
                "its pickle has {pickled} bytes for {rest} bytes of tensors: it describes more than it holds"
            )));
        }
        let pickle = Pickle::parse(&bytes).map_err(format)?;
        let (start, passed) = match key {
            Some(_) => (pickle.root(), Vec::new()),
            None => state_dictionary(&pickle),
        };
        let most_bytes = FREE_DESCRIPTION_BYTES.max(bytes.len() * MAX_DESCRIPTION_PER_BYTE);
        let mut tensors = named_tensors(&pickle, start, most_bytes).map_err(format)?;
        if let Some(key) = key {
            tensors = under(key, tensors).map_err(format)?;
        }
        if tensors.is_empty() {
            return Err(format("it holds no tensors".into()));
        }
        check_sizes(&tensors, file_bytes).map_err(format)?;
        Ok(Described { archive, folder, tensors, passed, file_bytes })
    }
}

/// One entry's bytes, its checksum verified.
fn entry(archive: &mut Archive, name: &str, limit: u64) -> Result<Vec<u8>, String> {
    let unreadable = |error: ZipError| format!("the archive's `{name}` cannot be read: {error}");
    let index = archive.index_for_name(name).ok_or(ZipError::FileNotFound).map_err(unreadable)?;
    // The raw entry says how it is compressed; the other one is refused where it is, and checks the sum.
    if archive.by_index_raw(index).map_err(unreadable)?.compression() != CompressionMethod::Stored {
        return Err(format!(
            "the archive's `{name}` is compressed, which PyTorch never does; save it anew with torch.save"
        ));
    }
    let mut entry = archive.by_index(index).map_err(unreadable)?;
    if entry.size() > limit {
        return Err(format!("the archive's `{name}` has {} bytes where at most {limit} are expected", entry.size()));
    }
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes).map_err(|error| format!("the archive's `{name}` is damaged: {error}"))?;
    Ok(bytes)
}

/// The tensors below a dictionary, by their dotted names.
fn named_tensors(pickle: &Pickle, start: Id, most_bytes: usize) -> Result<BTreeMap<String, Tensor>, String> {
    let mut found = BTreeMap::new();
    let (mut visits, mut left) = (0, most_bytes);
    let mut spend = |bytes: usize| match left.checked_sub(bytes) {
        Some(rest) => {
            left = rest;
            Ok(())
        }
        None => Err("its pickle names its tensors far more often than weights do".to_owned()),
    };
    let mut waiting = vec![(String::new(), start, 0)];
    while let Some((prefix, id, depth)) = waiting.pop() {
        match pickle.node(id) {
            Node::Tensor(tensor) => {
                spend(tensor.storage.key.len() + 2 * size_of_val(&tensor.shape[..]))?;
                found.insert(prefix, Tensor::clone(tensor));
            }
            Node::Dict { entries, .. } => {
                for (key, value) in entries {
                    visits += 1;
                    if visits > MAX_VISITS {
                        return Err("its dictionaries are nested too deeply".into());
                    }
                    if !matches!(pickle.node(*value), Node::Tensor(_) | Node::Dict { .. }) {
                        continue;
                    }
                    if depth > MAX_DEPTH {
                        return Err("its dictionaries are nested too deeply".into());
                    }
                    let name = match pickle.node(*key) {
                        Node::Text(text) if text.len() + prefix.len() > MAX_NAME_BYTES => {
                            return Err("a tensor's name in it is far too long".into());
                        }
                        Node::Text(text) if prefix.is_empty() => text.clone(),
                        Node::Text(text) => format!("{prefix}.{text}"),
                        Node::Int(number) => format!("{prefix}.{number}"),
                        _ => continue,
                    };
                    spend(size_of::<Tensor>() + name.len())?;
                    waiting.push((name, *value, depth + 1));
                }
            }
            _ => {}
        }
    }
    Ok(found)
}

/// Unwraps what training scripts put around the weights. The names of dictionaries of tensors that are passed over come with
/// it.
fn state_dictionary(pickle: &Pickle) -> (Id, Vec<String>) {
    let is_dictionary = |id: Id| matches!(pickle.node(id), Node::Dict { .. });
    // A dictionary may be named again and again, and is looked through once.
    let mut known: HashMap<Id, bool> = HashMap::new();
    let mut holds_tensors = |id: Id| {
        *known.entry(id).or_insert_with(|| match pickle.node(id) {
            Node::Dict { entries, .. } => {
                entries.iter().any(|(_, value)| matches!(pickle.node(*value), Node::Tensor(_)))
            }
            _ => false,
        })
    };
    let mut current = pickle.root();
    let mut passed = Vec::new();
    for _ in 0..WRAPPERS.len() {
        if holds_tensors(current) {
            break;
        }
        let inner = WRAPPERS.iter().filter_map(|key| pickle.get(current, key)).find(|id| is_dictionary(*id));
        match inner {
            Some(inner) => {
                if let Node::Dict { entries, .. } = pickle.node(current) {
                    for (key, value) in entries {
                        if let Node::Text(name) = pickle.node(*key)
                            && passed.len() < MAX_PASSED
                            && *value != inner
                            && holds_tensors(*value)
                        {
                            passed.push(name.clone());
                        }
                    }
                }
                current = inner;
            }
            None => break,
        }
    }
    (current, passed)
}

/// Refuses tensors that the file cannot hold: views may overlap, so a small file can describe large tensors; weights share
/// some storage, not all of it many times.
fn check_sizes(tensors: &BTreeMap<String, Tensor>, file_bytes: u64) -> Result<(), String> {
    let most_elements = file_bytes.saturating_mul(4);
    let mut elements: u64 = 0;
    for (name, tensor) in tensors {
        let count = element_count(&tensor.shape).ok_or_else(|| format!("the shape of `{name}` is absurd"))?;
        elements = elements.saturating_add(count as u64);
        if elements > most_elements {
            return Err("its tensors are far larger than the file".into());
        }
    }
    Ok(())
}

/// Reads every storage once and lays out the tensors that view it.
fn load(
    archive: &mut Archive,
    folder: &str,
    tensors: BTreeMap<String, Tensor>,
    file_bytes: u64,
) -> Result<TensorMap, String> {
    let mut by_storage: BTreeMap<String, (Storage, Vec<(String, Tensor)>)> = BTreeMap::new();
    for (name, tensor) in tensors {
        let (storage, views) =
            by_storage.entry(tensor.storage.key.clone()).or_insert_with(|| (tensor.storage.clone(), Vec::new()));
        if *storage != tensor.storage {
            return Err(format!("storage `{}` is described in two ways", storage.key));
        }
        views.push((name, tensor));
    }
    let mut loaded = TensorMap::new();
    // Entries may lie over each other, and all of them together are in the file.
    let mut left = file_bytes;
    for (key, (storage, views)) in by_storage {
        let data = load_storage(archive, &format!("{folder}data/{key}"), &storage, &mut left)?;
        for (name, tensor) in views {
            let data = lay_out(&data, &tensor).ok_or_else(|| format!("`{name}` reaches beyond its storage"))?;
            loaded.insert(name, HostTensor { shape: tensor.shape, data });
        }
    }
    Ok(loaded)
}

/// Reads a storage, for which `left` bytes of the file are left.
fn load_storage(archive: &mut Archive, name: &str, storage: &Storage, left: &mut u64) -> Result<Vec<f32>, String> {
    let bytes = entry(archive, name, *left)?;
    *left -= bytes.len() as u64;
    let expected = storage.count.checked_mul(storage.element.size());
    let bytes = expected.and_then(|expected| bytes.get(..expected)).ok_or_else(|| {
        let (there, count) = (bytes.len(), storage.count);
        format!("the archive's `{name}` is truncated: it has {there} bytes for {count} numbers")
    })?;
    let mut data = Vec::with_capacity(storage.count);
    storage.element.decode(bytes, &mut data);
    Ok(data)
}

/// Copies a view into row-major order; `None` if it reaches beyond its storage.
fn lay_out(storage: &[f32], tensor: &Tensor) -> Option<Vec<f32>> {
    let count = element_count(&tensor.shape)?;
    if count == 0 {
        return Some(Vec::new());
    }
    let mut last = tensor.offset;
    let mut contiguous = true;
    let mut row_major = 1;
    for (&length, &stride) in tensor.shape.iter().zip(&tensor.strides).rev() {
        last = last.checked_add((length - 1).checked_mul(stride)?)?;
        contiguous &= length == 1 || stride == row_major;
        row_major *= length;
    }
    if last >= storage.len() {
        return None;
    }
    if contiguous {
        return Some(storage[tensor.offset..tensor.offset + count].to_vec());
    }
    let mut data = Vec::with_capacity(count);
    // The stride of a dimension of length one means nothing and may be anything.
    let strides: Vec<_> = tensor
        .shape
        .iter()
        .zip(&tensor.strides)
        .map(|(length, stride)| if *length == 1 { 0 } else { *stride })
        .collect();
    let mut index = vec![0; tensor.shape.len()];
    let mut place = tensor.offset;
    loop {
        data.push(storage[place]);
        let mut dimension = tensor.shape.len();
        loop {
            if dimension == 0 {
                return Some(data);
            }
            dimension -= 1;
            index[dimension] += 1;
            place += strides[dimension];
            if index[dimension] < tensor.shape[dimension] {
                break;
            }
            place -= strides[dimension] * tensor.shape[dimension];
            index[dimension] = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Behind the archive's checksums, which an attacker computes anew.
    #[test]
    fn mutated_pickles_neither_panic_nor_allocate_without_bound() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/weights/views.pth");
        let file_bytes = std::fs::metadata(&path).unwrap().len();
        let mut archive = ZipArchive::new(BufReader::new(File::open(&path).unwrap())).unwrap();
        let whole = entry(&mut archive, "views/data.pkl", MAX_PICKLE_BYTES).unwrap();
        let mut state = 221_108_887_u64;
        let mut draw = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        let (mut parsed, mut loaded) = (0, 0);
        for _ in 0..20_000 {
            let mut mutated = whole.clone();
            for _ in 0..=draw(3) {
                let at = draw(mutated.len());
                match draw(3) {
                    0 => mutated[at] = draw(256) as u8,
                    1 => mutated.insert(at, whole[draw(whole.len())]),
                    _ => {
                        mutated.remove(at);
                    }
                }
            }
            let Ok(pickle) = Pickle::parse(&mutated) else {
                continue;
            };
            parsed += 1;
            let Ok(tensors) = named_tensors(&pickle, state_dictionary(&pickle).0, FREE_DESCRIPTION_BYTES) else {
                continue;
            };
            if check_sizes(&tensors, file_bytes).is_err() {
                continue;
            }
            let Ok(tensors) = load(&mut archive, "views/", tensors, file_bytes) else {
                continue;
            };
            loaded += 1;
            let elements: usize = tensors.values().map(|tensor| tensor.data.len()).sum();
            assert!(elements as u64 <= 4 * file_bytes);
        }
        assert!(parsed > 500 && loaded > 300, "{parsed} parsed, {loaded} loaded");
    }

    #[test]
    fn a_pickle_that_repeats_itself_is_refused() {
        // A dictionary of 200 entries, each the whole dictionary before it, 200 deep.
        let mut bytes = b"\x80\x02}q\x00".to_vec();
        for _ in 0..200 {
            bytes.extend_from_slice(b"}(");
            for key in 0..200u8 {
                bytes.extend_from_slice(&[b'K', key, b'h', 0]);
            }
            bytes.extend_from_slice(b"uq\x00");
        }
        bytes.push(b'.');
        let pickle = Pickle::parse(&bytes).unwrap();
        let found = named_tensors(&pickle, state_dictionary(&pickle).0, FREE_DESCRIPTION_BYTES);
        assert!(found.unwrap_err().contains("names its tensors far more often"));
        // An object that takes over the same attributes again and again.
        let mut bytes = b"\x80\x02}(".to_vec();
        for key in 0..200u8 {
            bytes.extend_from_slice(&[b'K', key, b'N']);
        }
        bytes.extend_from_slice(b"uq\x000cargparse\nNamespace\n)\x81");
        bytes.extend(b"h\x00b".repeat(1_000));
        bytes.push(b'.');
        assert!(Pickle::parse(&bytes).unwrap_err().contains("repeats itself"));
    }
}
