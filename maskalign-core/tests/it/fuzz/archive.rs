//! PyTorch files in parts: zip archives with a pickle, to be edited and put together again.

use super::{
    crc32, edited, little,
    run::{Random, any_number},
};

/// A file of an archive.
#[derive(Clone)]
pub(super) struct File {
    pub(super) name: String,
    pub(super) data: Vec<u8>,
}

/// The files of an archive that is stored as PyTorch does; `None` where that is not understood.
pub(super) fn files(bytes: &[u8]) -> Option<Vec<File>> {
    let end = end_of(bytes)?;
    let mut at = little(bytes, end + 16, 4)?;
    let mut found = Vec::new();
    for _ in 0..little(bytes, end + 10, 2)? {
        let sizes = [little(bytes, at + 28, 2)?, little(bytes, at + 30, 2)?, little(bytes, at + 32, 2)?];
        let name = bytes.get(at + 46..at + 46 + sizes[0])?;
        let data = bytes.get(data_of(bytes, at)?)?;
        found.push(File { name: String::from_utf8_lossy(name).into_owned(), data: data.to_vec() });
        at += 46 + sizes.iter().sum::<usize>();
    }
    Some(found)
}

/// Where the record of the end is.
fn end_of(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).rposition(|window| window == b"PK\x05\x06")
}

/// Where the data of the entry at `at` of the directory lies.
fn data_of(bytes: &[u8], at: usize) -> Option<std::ops::Range<usize>> {
    let (local, size) = (little(bytes, at + 42, 4)?, little(bytes, at + 20, 4)?);
    let start = local.checked_add(30 + little(bytes, local + 26, 2)? + little(bytes, local + 28, 2)?)?;
    Some(start..start.checked_add(size)?)
}

/// An archive of these files. Those that share a place are written once: the archive then holds less than it says.
pub(super) fn archive(files: &[File], shared: bool) -> Vec<u8> {
    let (mut bytes, mut directory) = (Vec::new(), Vec::new());
    let mut places: Vec<(&File, u32)> = Vec::new();
    for file in files {
        let known = places.iter().find(|(other, _)| shared && other.data == file.data).map(|(_, place)| *place);
        let place = known.unwrap_or(bytes.len() as u32);
        places.push((file, place));
        let (crc, size) = (crc32(&file.data), file.data.len() as u32);
        let mut fields = vec![0, 0, 0, 0, 0, 0, 0, 0];
        fields.extend(crc.to_le_bytes());
        fields.extend([size.to_le_bytes(), size.to_le_bytes()].concat());
        fields.extend((file.name.len() as u16).to_le_bytes());
        fields.extend([0, 0]);
        if known.is_none() {
            bytes.extend([b"PK\x03\x04\x14\x00".as_slice(), &fields, file.name.as_bytes(), &file.data].concat());
        }
        directory.extend([b"PK\x01\x02\x14\x00\x14\x00".as_slice(), &fields, &[0; 10], &place.to_le_bytes()].concat());
        directory.extend(file.name.as_bytes());
    }
    let count = (files.len() as u16).to_le_bytes();
    let (size, start) = ((directory.len() as u32).to_le_bytes(), (bytes.len() as u32).to_le_bytes());
    bytes.extend(directory);
    bytes.extend([b"PK\x05\x06\x00\x00\x00\x00".as_slice(), &count, &count, &size, &start, &[0, 0]].concat());
    bytes
}

/// Makes the checksums of an archive right.
pub(super) fn mend(mut bytes: Vec<u8>) -> Vec<u8> {
    let Some(end) = end_of(&bytes) else { return bytes };
    let (Some(mut at), Some(count)) = (little(&bytes, end + 16, 4), little(&bytes, end + 10, 2)) else { return bytes };
    for _ in 0..count {
        let crc = data_of(&bytes, at).and_then(|data| Some(crc32(bytes.get(data)?).to_le_bytes()));
        let (Some(crc), Some(local)) = (crc, little(&bytes, at + 42, 4)) else { break };
        bytes[at + 16..at + 20].copy_from_slice(&crc);
        bytes[local + 14..local + 18].copy_from_slice(&crc);
        let lengths = [28, 30, 32].iter().map(|place| little(&bytes, at + place, 2).unwrap_or(0));
        at += 46 + lengths.sum::<usize>();
    }
    bytes
}

/// An edit of a PyTorch file.
pub(super) fn edit(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let mut files = files(bytes)?;
    let at = random.below(files.len());
    let pickle = files.iter().position(|file| file.name.ends_with("data.pkl"));
    let mut shared = false;
    match random.below(10) {
        0 => {
            let copy = files.get(at)?.clone();
            files.push(copy);
        }
        1 => {
            (at < files.len()).then(|| files.remove(at))?;
        }
        2 => {
            let other = random.pick(&files).name.clone();
            files.get_mut(at)?.name = other;
        }
        3 => {
            let name = edited(files.get(at)?.name.as_bytes(), random);
            files[at].name = String::from_utf8_lossy(&name).into_owned();
        }
        4 => {
            let data = edited(&files.get(at)?.data, random);
            files[at].data = data;
            shared = random.one_in(2);
        }
        5 => {
            let pickle = &mut files[pickle?].data;
            *pickle = edited(pickle, random);
        }
        _ => {
            let pickle = &mut files[pickle?].data;
            *pickle = edit_pickle(pickle, random)?;
        }
    }
    Some(archive(&files, shared))
}

/// The instructions of a pickle, each with what it takes from the stream; what is not understood is one of one byte.
fn instructions(pickle: &[u8]) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < pickle.len() {
        let line = |from: usize| {
            let end = pickle[from.min(pickle.len())..].iter().position(|byte| *byte == b'\n');
            end.map_or(pickle.len(), |end| from + end + 1)
        };
        let counted = |size: usize| 1 + size + little(pickle, at + 1, size).unwrap_or(0).min(pickle.len());
        let length = match pickle[at] {
            0x80 | b'K' | b'q' | b'h' => 2,
            b'M' => 3,
            b'J' | b'r' | b'j' => 5,
            b'G' | 0x95 => 9,
            b'U' | b'C' | 0x8c | 0x8a => counted(1),
            b'X' | b'T' | b'B' | 0x8b => counted(4),
            0x8d | 0x8e => counted(8),
            b'c' => line(line(at + 1)) - at,
            _ => 1,
        };
        let end = pickle.len().min(at + length);
        found.push(pickle[at..end].to_vec());
        at = end;
    }
    found
}

/// Edits whole instructions, so that what comes out is mostly a pickle.
fn edit_pickle(pickle: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    const BARE: &[u8] = b"(01N\x88\x89)]}tde.asul\x85\x86\x87\x94\x93QR\x81b";
    const NAMES: [&[u8]; 9] = [
        b"ccollections\nOrderedDict\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch._utils\n_rebuild_parameter\n",
        b"ctorch\nFloatStorage\n",
        b"ctorch\nByteStorage\n",
        b"ctorch\nSize\n",
        b"cargparse\nNamespace\n",
        b"cos\nsys\x1btem\n",
        b"\x8c\x03a\x1bb",
    ];
    let mut instructions = instructions(pickle);
    let at = random.below(instructions.len());
    let other = instructions.get(random.below(instructions.len()))?.clone();
    match random.below(9) {
        0 => {
            instructions.remove(at);
        }
        1 => instructions.insert(at, other),
        2 => instructions[at] = other,
        3 => instructions.insert(at, vec![*random.pick(BARE)]),
        4 => instructions.insert(at, random.pick(&NAMES).to_vec()),
        5 => {
            let end = instructions.len().min(at + 1 + random.below(12));
            let times = if random.one_in(3) { 1 + random.below(200) } else { 1 };
            let slice = vec![instructions[at..end].concat(); times];
            instructions.splice(end..end, slice);
        }
        6 => {
            // A number in place of a number: sizes, strides, offsets, places in the memo.
            let numbers: Vec<usize> = (0..instructions.len())
                .filter(|&at| matches!(instructions[at][0], b'K' | b'M' | b'J' | 0x8a))
                .collect();
            let at = *numbers.get(random.below(numbers.len()))?;
            let value = any_number(little(&instructions[at], 1, instructions[at].len() - 1)? as u64, 8, random);
            instructions[at] = match random.below(3) {
                0 => vec![b'K', value as u8],
                1 => [&b"J"[..], &(value as u32).to_le_bytes()[..]].concat(),
                _ => [&[0x8a, 8], &value.to_le_bytes()[..]].concat(),
            };
        }
        7 => {
            let memo: Vec<usize> =
                (0..instructions.len()).filter(|&at| matches!(instructions[at][0], b'q' | b'h')).collect();
            let at = *memo.get(random.below(memo.len()))?;
            *instructions[at].get_mut(1)? = random.below(64) as u8;
        }
        _ => {
            let (from, to) = (at, random.below(instructions.len()));
            instructions.swap(from, to);
        }
    }
    Some(instructions.concat())
}
