//! What every fuzz target shares: inputs that are real files with edits, and what a reader owes whatever it is given.
//!
//! Random bytes end at the first magic number, so that each input begins as a file that is read: a few edits that know
//! its format or know bytes alone, and then its checksums and lengths made right again, as an attacker would. Which inputs
//! these are follows from a seed and a number, so that they are the same on every machine.
//!
//! `MASKALIGN_FUZZ_SECONDS=600` lets each target run that long in place of its usual number of inputs, and
//! `MASKALIGN_FUZZ_SEED=7` takes other inputs. Like the file of layers, this one can be included by any crate of the
//! workspace by `#[path]`; it depends on `std` and on a counting allocator.

use std::{
    env, fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// The seed that is taken where the environment names none.
const SEED: u64 = 20_230_618;
/// What one input may take, in a build that is not optimised, on a machine that does other things.
const PATIENCE: Duration = Duration::from_secs(60);
/// Committed inputs from here on are read and not edited.
const LARGE: usize = 8 << 10;
/// What making a failing input smaller may take.
const SHRINKING: Duration = Duration::from_secs(20);
/// Numbers in decimal that readers may not expect.
const NUMBERS: [&str; 22] = [
    "0",
    "1",
    "2",
    "-1",
    "-0",
    "7",
    "255",
    "256",
    "65535",
    "65536",
    "2147483647",
    "2147483648",
    "4294967295",
    "4294967296",
    "9007199254740993",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "0.5",
    "1e400",
    "1e-400",
];

/// SplitMix64: the inputs are the same on every machine.
pub(crate) struct Random(u64);

impl Random {
    /// The stream of one input of a target.
    fn of(seed: u64, target: &str, case: u64) -> Random {
        let mut random = Random(seed ^ case.wrapping_mul(0xd6e8_feb8_6659_fd93));
        for byte in target.bytes() {
            random.0 = random.next() ^ u64::from(byte);
        }
        random
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`; 0 where that is 0.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    /// True once in so many times.
    pub(crate) fn one_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    pub(crate) fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    /// A stretch of `length` bytes, mostly a short one.
    fn stretch(&mut self, length: usize) -> (usize, usize) {
        let start = self.below(length);
        let most = if self.one_in(4) { length } else { 32 };
        (start, length.min(start + 1 + self.below(most)))
    }
}

/// What a reader made of an input.
pub(crate) enum Outcome {
    /// It took it, and what it made of it takes so many bytes.
    Accepted(u64),
    /// What the user is told.
    Refused(String),
}

/// A reader, and the inputs it is given.
pub(crate) struct Target<'a> {
    pub(crate) name: &'a str,
    /// The folder of the committed inputs of all targets of this crate; those of this one are in a folder of its name.
    pub(crate) committed: &'a Path,
    /// Files that are read, by name.
    pub(crate) seeds: Vec<(String, Vec<u8>)>,
    /// An edit that knows the format; `None` where it finds nothing to edit.
    pub(crate) edit: &'a dyn Fn(&[u8], &mut Random) -> Option<Vec<u8>>,
    /// Makes checksums and lengths right again.
    pub(crate) mend: &'a dyn Fn(Vec<u8>) -> Vec<u8>,
    /// Reads an input, and checks what it accepts.
    pub(crate) read: &'a dyn Fn(&[u8]) -> Outcome,
    /// Bytes of memory that may be taken for an input and what it is read to, of so many bytes: 0 where it is refused.
    pub(crate) memory: &'a dyn Fn(&[u8], u64) -> u64,
    /// Inputs that are tried where the environment says nothing else.
    pub(crate) cases: u64,
    /// Inputs are cut off here.
    pub(crate) most_bytes: usize,
}

/// How an input ended.
struct End {
    accepted: bool,
    took: Duration,
    used: u64,
}

impl Target<'_> {
    /// Reads every committed input, every seed, and inputs made from these.
    ///
    /// # Panics
    /// The reader panicked, took too long or too much memory, refused without words or with characters that act on a
    /// terminal, or what it accepted is wrong. The input is then in a file that the message names.
    #[expect(clippy::print_stdout, reason = "how many were accepted is worth a look where the test passes too")]
    pub(crate) fn run(mut self) {
        let folder = self.committed.join(self.name);
        let mut known = files_in(&folder);
        for (name, bytes) in self.seeds.iter().chain(&known) {
            if let Err(reason) = self.one(bytes) {
                panic!("{}: {name}: {reason}", self.name);
            }
        }
        // The large ones are slow, and are what they are by their size.
        known.retain(|(_, bytes)| bytes.len() < LARGE);
        self.seeds.append(&mut known);
        let seed = variable("MASKALIGN_FUZZ_SEED").unwrap_or(SEED);
        let seconds = variable("MASKALIGN_FUZZ_SECONDS").map(Duration::from_secs);
        let began = Instant::now();
        let mut ends = Vec::new();
        for case in 0.. {
            let is_over = seconds.map_or(case >= self.cases, |seconds| began.elapsed() >= seconds);
            if is_over {
                break;
            }
            let input = self.input(&mut Random::of(seed, self.name, case));
            if seconds.is_some() {
                // What ends the whole process leaves no word of its input.
                let _ = fs::write(self.kept("last"), &input);
            }
            match self.one(&input) {
                Ok(end) => ends.push(end),
                Err(reason) => self.fail(&format!("input {case} of seed {seed}"), input, reason),
            }
        }
        let accepted = ends.iter().filter(|end| end.accepted).count();
        let slowest = ends.iter().enumerate().max_by_key(|(_, end)| end.took);
        let (slowest, took) = slowest.map(|(case, end)| (case, end.took)).unwrap_or_default();
        let used = ends.iter().map(|end| end.used).max().unwrap_or_default();
        println!(
            "{}: {} inputs in {:.1} s, {accepted} accepted; at most {took:.1?} (input {slowest}) and {} KiB",
            self.name,
            ends.len(),
            began.elapsed().as_secs_f64(),
            used >> 10
        );
        let refused = ends.len() - accepted;
        assert!(
            accepted > 0 && refused > 0,
            "{}: {accepted} accepted, {refused} refused: edits are too coarse, or none",
            self.name
        );
    }

    /// One input: a seed with a few edits.
    fn input(&self, random: &mut Random) -> Vec<u8> {
        let mut bytes = random.pick(&self.seeds).1.clone();
        for _ in 0..=random.below(4).min(random.below(4)) {
            let edited = if random.one_in(2) { (self.edit)(&bytes, random) } else { None };
            match edited {
                Some(edited) => bytes = edited,
                None => edit_bytes(&mut bytes, &random.pick(&self.seeds).1, random),
            }
            bytes.truncate(self.most_bytes);
        }
        if random.one_in(4) { bytes } else { (self.mend)(bytes) }
    }

    /// Reads one input; what is wrong with how it went.
    fn one(&self, bytes: &[u8]) -> Result<End, String> {
        let began = Instant::now();
        let mut outcome = None;
        let used = allocation_counter::measure(|| {
            outcome = Some(catch_unwind(AssertUnwindSafe(|| (self.read)(bytes))));
        });
        let (took, used) = (began.elapsed(), used.bytes_max);
        let outcome = outcome.expect("it was set").map_err(|panic| {
            let said = panic.downcast_ref::<String>().cloned();
            let said = said.or_else(|| panic.downcast_ref::<&str>().map(|said| (*said).to_owned()));
            format!("it panicked: {}", said.unwrap_or_default())
        })?;
        if took > PATIENCE {
            return Err(format!("it took {took:.1?}"));
        }
        let accepted = match &outcome {
            Outcome::Accepted(bytes) => Some(*bytes),
            Outcome::Refused(message) => {
                check_message(message)?;
                None
            }
        };
        let allowed = (self.memory)(bytes, accepted.unwrap_or(0));
        if used > allowed {
            let end = if accepted.is_some() { "accepted" } else { "refused" };
            return Err(format!("it took {used} bytes of memory where {allowed} are allowed, and was {end}"));
        }
        Ok(End { accepted: accepted.is_some(), took, used })
    }

    /// Where an input is kept that others are to see.
    fn kept(&self, end: &str) -> PathBuf {
        env::temp_dir().join(format!("maskalign-fuzz-{}-{end}", self.name.replace('/', "-")))
    }

    /// Makes the input smaller, keeps it, and says so.
    fn fail(&self, what: &str, input: Vec<u8>, reason: String) -> ! {
        let (input, reason) = self.smaller(input, reason);
        let path = self.kept("failed");
        let kept = match fs::write(&path, &input) {
            Ok(()) => format!("is in {}", path.display()),
            Err(error) => format!("cannot be kept: {error}"),
        };
        panic!(
            "{}: {what}: {reason}\nthe input ({} bytes) {kept}; mend the reader, and commit the input in {}",
            self.name,
            input.len(),
            self.committed.join(self.name).display()
        );
    }

    /// Leaves out what is not needed for a failure.
    fn smaller(&self, mut input: Vec<u8>, mut reason: String) -> (Vec<u8>, String) {
        let began = Instant::now();
        let mut size = input.len() / 2;
        while size > 0 {
            let mut at = 0;
            while at < input.len() && began.elapsed() < SHRINKING {
                let end = input.len().min(at + size);
                let without = [&input[..at], &input[end..]].concat();
                let tried = [without.clone(), (self.mend)(without)];
                match tried.into_iter().find_map(|tried| Some((self.one(&tried).err()?, tried))) {
                    Some((found, tried)) if tried.len() < input.len() => (reason, input) = (found, tried),
                    _ => at += size,
                }
            }
            size /= 2;
        }
        (input, reason)
    }
}

/// What every refusal owes its reader.
fn check_message(message: &str) -> Result<(), String> {
    if message.trim().is_empty() {
        return Err("it refuses without a word".into());
    }
    // Some messages are lists of several lines.
    match message.chars().find(|c| c.is_control() && *c != '\n') {
        Some(c) => Err(format!("it refuses with {c:?}, on which a terminal may act: {message:?}")),
        None => Ok(()),
    }
}

fn variable(name: &str) -> Option<u64> {
    let value = env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} is `{value}`, and a whole number was expected")))
}

/// The files of a folder by name, sorted; none if there is no such folder.
pub(crate) fn files_in(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.retain(|path| path.is_file());
    paths.sort();
    let read = |path: &PathBuf| {
        let name = path.file_name().expect("a file's name").to_string_lossy().into_owned();
        (name, fs::read(path).expect("a committed input"))
    };
    paths.iter().map(read).collect()
}

/// An edit that knows bytes and decimal numbers alone; `other` is another input of the target.
pub(crate) fn edit_bytes(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    if bytes.is_empty() {
        bytes.extend_from_slice(other);
        return;
    }
    let at = random.below(bytes.len());
    match random.below(14) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = *random.pick(&[0, 1, 0x20, 0x7f, 0x80, 0xfe, 0xff]),
        2 => bytes.truncate(at),
        3 => {
            let (start, end) = random.stretch(bytes.len());
            bytes.drain(start..end);
        }
        4 => {
            let (start, end) = random.stretch(bytes.len());
            let times = if random.one_in(4) { 1 + random.below(500) } else { 1 };
            let slice = bytes[start..end].repeat(times);
            bytes.splice(end..end, slice);
        }
        5 => {
            let fill = *random.pick(&[0, 0xff, b' ', b'\n', 0x1b, b'9']);
            let count = 1 + random.below(64);
            bytes.splice(at..at, std::iter::repeat_n(fill, count));
        }
        6 => {
            let (start, end) = random.stretch(bytes.len());
            let slice = bytes[start..end].to_vec();
            let end = bytes.len().min(at + slice.len());
            bytes[at..end].copy_from_slice(&slice[..end - at]);
        }
        7 => {
            bytes.truncate(at);
            bytes.extend_from_slice(&other[random.below(other.len())..]);
        }
        8 if !other.is_empty() => {
            let (start, end) = random.stretch(other.len());
            bytes.splice(at..at, other[start..end].iter().copied());
        }
        9 => {
            let count = 1 + random.below(8);
            let drawn: Vec<u8> = (0..count).map(|_| random.next() as u8).collect();
            let end = bytes.len().min(at + count);
            bytes.splice(at..end, drawn);
        }
        10 if edit_number(bytes, random) => {}
        _ => edit_field(bytes, at, random),
    }
}

/// Replaces a number of one to eight bytes at `at`, little or big end first.
pub(crate) fn edit_field(bytes: &mut [u8], at: usize, random: &mut Random) {
    let size = (*random.pick(&[1, 2, 2, 4, 4, 8])).min(bytes.len() - at);
    let field = &mut bytes[at..at + size];
    let is_big = random.one_in(2);
    let fold = |value: u64, byte: &u8| value << 8 | u64::from(*byte);
    let old = if is_big { field.iter().fold(0, fold) } else { field.iter().rev().fold(0, fold) };
    let new = any_number(old, size, random).to_le_bytes();
    field.copy_from_slice(&new[..size]);
    if is_big {
        field.reverse();
    }
}

/// Another number of `size` bytes.
pub(crate) fn any_number(old: u64, size: usize, random: &mut Random) -> u64 {
    let most = u64::MAX >> (64 - 8 * size.clamp(1, 8));
    match random.below(10) {
        0 => 0,
        1 => most,
        2 => most - random.below(16) as u64,
        3 => most / 2 + random.below(3) as u64,
        4 => old.wrapping_add(1),
        5 => old.wrapping_sub(1),
        6 => old.wrapping_mul(2),
        7 => 1 << random.below(8 * size),
        _ => random.below(64) as u64,
    }
}

/// Replaces a number in decimal; false where there is none.
pub(crate) fn edit_number(bytes: &mut Vec<u8>, random: &mut Random) -> bool {
    let starts: Vec<usize> = (0..bytes.len())
        .filter(|&at| bytes[at].is_ascii_digit() && (at == 0 || !bytes[at - 1].is_ascii_digit()))
        .collect();
    if starts.is_empty() {
        return false;
    }
    let start = *random.pick(&starts);
    let length = bytes[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let number = *random.pick(&NUMBERS);
    bytes.splice(start..start + length, number.bytes());
    true
}

/// Another number in decimal.
pub(crate) fn any_decimal(random: &mut Random) -> &'static str {
    random.pick::<&str>(&NUMBERS)
}
