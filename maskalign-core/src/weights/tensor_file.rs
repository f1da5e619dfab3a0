//! The safetensors format, read and written.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde_json::{Map, Value, json};

use super::element::{Element, element_count};
use super::error::WeightsError;
use super::{HostTensor, TensorMap};
use crate::files::{RunError, atomic_write};

/// A header is refused beyond this, as in the reference implementation.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// A header of more bytes than this describes tensors that are there: what is read of it takes many times its size.
const FREE_HEADER_BYTES: u64 = 1 << 20;
const CHUNK_BYTES: usize = 1 << 20;
/// A tensor whose name is longer is refused: names are compared with each other.
pub(super) const MAX_NAME_BYTES: usize = 1024;

/// A safetensors file whose header has been read and found to fit the file's length.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    header: Metadata,
    data_starts: u64,
}

impl TensorFile {
    /// Reads and checks the header alone.
    pub fn open(path: &Path) -> Result<TensorFile, WeightsError> {
        let file = File::open(path).map_err(|source| WeightsError::io(path, source))?;
        TensorFile::of(path, file)
    }

    /// As [`TensorFile::open`], of a file that is open.
    pub(crate) fn of(path: &Path, mut file: File) -> Result<TensorFile, WeightsError> {
        let format = |reason: String| WeightsError::format(path, reason);
        let io = |source| WeightsError::io(path, source);
        let length = file.metadata().map_err(io)?.len();
        let mut header_bytes = [0; 8];
        file.read_exact(&mut header_bytes).map_err(io)?;
        let header_bytes = u64::from_le_bytes(header_bytes);
        if header_bytes > MAX_HEADER_BYTES {
            return Err(format(format!("its header claims {header_bytes} bytes: it is not a safetensors file")));
        }
        let data_starts = 8 + header_bytes;
        if data_starts > length {
            return Err(format(format!(
                "the file is truncated: its header ends at byte {data_starts}, the file at byte {length}"
            )));
        }
        if header_bytes > FREE_HEADER_BYTES && header_bytes > length - data_starts {
            let data_bytes = length - data_starts;
            return Err(format(format!(
                "its header has {header_bytes} bytes for {data_bytes} bytes of tensors: it describes more than it holds"
            )));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact(&mut header).map_err(io)?;
        let header: Metadata = serde_json::from_slice(&header)
            .map_err(|error| format(format!("its safetensors header is not valid: {error}")))?;
        // In the order of names, so that of several one is told, and always the same.
        for (name, info) in BTreeMap::from_iter(header.tensors()) {
            if name.len() > MAX_NAME_BYTES {
                return Err(format("a tensor's name in it is far too long".into()));
            }
            if element_count(&info.shape).is_none() {
                return Err(format(format!("the shape of `{name}` is absurd: {:?}", info.shape)));
            }
        }
        let data_bytes = header.tensors().values().map(|info| info.data_offsets.1).max().unwrap_or(0);
        let expected = data_starts.saturating_add(data_bytes as u64);
        if expected != length {
            let problem = if length < expected { "is truncated" } else { "has bytes after its last tensor" };
            return Err(format(format!(
                "the file {problem}: its header describes {expected} bytes, the file has {length}"
            )));
        }
        Ok(TensorFile { path: path.to_owned(), file, header, data_starts })
    }

    /// The header's free metadata.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        self.header.metadata().clone().unwrap_or_default().into_iter().collect()
    }

    /// Names and shapes of all tensors.
    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.header.tensors().into_iter().map(|(name, info)| (name, info.shape.clone())).collect()
    }

    /// Reads all tensors, one after another: memory beyond the result is one small buffer.
    pub fn read_all(mut self) -> Result<TensorMap, WeightsError> {
        let infos: HashMap<_, _> = self.header.tensors();
        let mut by_offset: Vec<_> = infos.into_iter().collect();
        by_offset.sort_by_key(|(_, info)| info.data_offsets);
        let mut tensors = TensorMap::new();
        let mut chunk = vec![0; CHUNK_BYTES];
        for (name, info) in by_offset {
            let element = element_of(info.dtype).ok_or_else(|| {
                let reason = format!("tensor `{name}` holds {:?}, which is not supported", info.dtype);
                WeightsError::format(&self.path, reason)
            })?;
            let (start, end) = info.data_offsets;
            let io = |source| WeightsError::io(&self.path, source);
            self.file.seek(SeekFrom::Start(self.data_starts + start as u64)).map_err(io)?;
            let mut data = Vec::with_capacity((end - start) / element.size());
            let mut left = end - start;
            while left > 0 {
                let part = left.min(CHUNK_BYTES);
                self.file.read_exact(&mut chunk[..part]).map_err(io)?;
                element.decode(&chunk[..part], &mut data);
                left -= part;
            }
            tensors.insert(name, HostTensor { shape: info.shape.clone(), data });
        }
        Ok(tensors)
    }
}

fn element_of(dtype: Dtype) -> Option<Element> {
    Some(match dtype {
        Dtype::F64 => Element::F64,
        Dtype::F32 => Element::F32,
        Dtype::F16 => Element::F16,
        Dtype::BF16 => Element::Bf16,
        Dtype::I64 => Element::I64,
        Dtype::I32 => Element::I32,
        Dtype::I16 => Element::I16,
        Dtype::I8 => Element::I8,
        Dtype::U64 => Element::U64,
        Dtype::U32 => Element::U32,
        Dtype::U16 => Element::U16,
        Dtype::U8 => Element::U8,
        Dtype::BOOL => Element::Bool,
        _ => return None,
    })
}

/// A tensor to be written.
#[derive(Debug)]
pub struct TensorRef<'a> {
    /// Its name in the file.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values, row-major.
    pub data: TensorData<'a>,
}

/// Where the values of a [`TensorRef`] are.
pub enum TensorData<'a> {
    /// In the host's memory.
    Host(&'a [f32]),
    /// On a device: so many, copied when they are written. A checkpoint then needs room for one tensor, not for all.
    Device(usize, Box<dyn Fn() -> Vec<f32> + 'a>),
}

impl TensorData<'_> {
    fn len(&self) -> usize {
        match self {
            TensorData::Host(values) => values.len(),
            TensorData::Device(len, _) => *len,
        }
    }

    fn values(&self) -> Cow<'_, [f32]> {
        match self {
            TensorData::Host(values) => Cow::Borrowed(values),
            TensorData::Device(_, read) => Cow::Owned(read()),
        }
    }
}

impl std::fmt::Debug for TensorData<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} values", self.len())
    }
}

impl<'a> TensorRef<'a> {
    /// Borrows all tensors of a map.
    pub fn all_of(tensors: &'a TensorMap) -> Vec<TensorRef<'a>> {
        tensors
            .iter()
            .map(|(name, t)| TensorRef { name: name.clone(), shape: t.shape.clone(), data: TensorData::Host(&t.data) })
            .collect()
    }
}

/// Writes a safetensors file: whole or not at all, and equal input gives equal bytes.
///
/// Tensors are sorted by name. `metadata` is one key and its text: the format's metadata is a map without order, so more
/// than one would not be reproducible by other writers.
pub fn write_safetensors(path: &Path, tensors: &TensorMap, metadata: Option<(&str, &str)>) -> Result<(), RunError> {
    atomic_write(path, "weights", |file| write_tensors(file, &TensorRef::all_of(tensors), metadata))
}

/// Writes the safetensors format, tensors sorted by name, values in a small buffer.
pub(crate) fn write_tensors(
    out: &mut impl Write,
    tensors: &[TensorRef<'_>],
    metadata: Option<(&str, &str)>,
) -> io::Result<()> {
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidInput, reason);
    let sorted = sorted(tensors);
    let mut header = Map::new();
    if let Some((key, text)) = metadata {
        header.insert("__metadata__".into(), json!({ key: text }));
    }
    let mut offset = 0;
    for tensor in &sorted {
        if element_count(&tensor.shape) != Some(tensor.data.len()) {
            let (name, shape, length) = (&tensor.name, &tensor.shape, tensor.data.len());
            return Err(invalid(format!("tensor `{name}` of shape {shape:?} has {length} values")));
        }
        let end = offset + tensor.data.len() * Element::F32.size();
        let entry = json!({ "dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, end] });
        if header.insert(tensor.name.clone(), entry).is_some() {
            return Err(invalid(format!("two tensors are named `{}`", tensor.name)));
        }
        offset = end;
    }
    let mut header = Value::Object(header).to_string();
    // Values begin at a multiple of eight bytes.
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    for tensor in &sorted {
        for_each_chunk(&tensor.data.values(), |bytes| out.write_all(bytes))?;
    }
    Ok(())
}

/// BLAKE3 over what stands before the tensors and over their names, shapes and values, sorted by name.
pub(crate) fn digest(before: &[u8], tensors: &[TensorRef<'_>]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(before);
    for tensor in sorted(tensors) {
        hasher.update(&(tensor.name.len() as u64).to_le_bytes());
        hasher.update(tensor.name.as_bytes());
        hasher.update(&(tensor.shape.len() as u64).to_le_bytes());
        for length in &tensor.shape {
            hasher.update(&(*length as u64).to_le_bytes());
        }
        let Ok(()) = for_each_chunk(&tensor.data.values(), |bytes| {
            hasher.update(bytes);
            Ok::<_, Infallible>(())
        });
    }
    hasher.finalize()
}

fn sorted<'a, 'b>(tensors: &'b [TensorRef<'a>]) -> Vec<&'b TensorRef<'a>> {
    let mut sorted: Vec<_> = tensors.iter().collect();
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    sorted
}

/// Hands out the little-endian bytes of `data`, a buffer at a time.
fn for_each_chunk<E>(data: &[f32], mut use_bytes: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
    let mut buffer = Vec::with_capacity(CHUNK_BYTES.min(data.len() * Element::F32.size()));
    for part in data.chunks(CHUNK_BYTES / Element::F32.size()) {
        buffer.clear();
        buffer.extend(part.iter().flat_map(|value| value.to_le_bytes()));
        use_bytes(&buffer)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn one() -> TensorMap {
        let a = HostTensor { shape: vec![2, 2], data: vec![1.0, 2.0, 3.0, 4.5] };
        let b = HostTensor { shape: vec![], data: vec![-1.0] };
        TensorMap::from([("a".to_owned(), a), ("b".to_owned(), b)])
    }

    #[test]
    fn the_reference_implementation_reads_what_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.safetensors");
        write_safetensors(&path, &one(), Some(("maskalign", "{\"a\": \"\\n\"}"))).unwrap();
        let bytes = fs::read(&path).unwrap();
        let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let a = read.tensor("a").unwrap();
        assert_eq!((a.dtype(), a.shape()), (Dtype::F32, &[2, 2][..]));
        assert_eq!(a.data(), [1.0f32, 2.0, 3.0, 4.5].map(f32::to_le_bytes).concat());
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(header.metadata().as_ref().unwrap()["maskalign"], "{\"a\": \"\\n\"}");
        assert_eq!(TensorFile::open(&path).unwrap().read_all().unwrap(), one());
    }

    #[test]
    fn a_truncated_or_lengthened_file_is_refused_with_both_lengths() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.safetensors");
        write_safetensors(&path, &one(), None).unwrap();
        let bytes = fs::read(&path).unwrap();
        for length in 0..bytes.len() {
            fs::write(&path, &bytes[..length]).unwrap();
            let error = TensorFile::open(&path).unwrap_err().to_string();
            assert!(error.contains("truncated"), "{length}: {error}");
        }
        fs::write(&path, [&bytes[..], &[0]].concat()).unwrap();
        let error = TensorFile::open(&path).unwrap_err().to_string();
        assert!(error.contains("after its last tensor"), "{error}");
    }

    #[test]
    fn a_header_that_lies_about_sizes_is_refused_without_allocating_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.safetensors");
        for header in [
            r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}}"#,
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#,
            r#"{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}"#,
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#,
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
            "[1, 2]",
        ] {
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend_from_slice(header.as_bytes());
            bytes.extend_from_slice(&[0; 8]);
            fs::write(&path, bytes).unwrap();
            assert!(matches!(TensorFile::open(&path), Err(WeightsError::Format { .. })), "{header}");
        }
        fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
        assert!(matches!(TensorFile::open(&path), Err(WeightsError::Format { .. })));
    }
}
