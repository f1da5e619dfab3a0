//! The writer of `metrics.jsonl`.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::files::{RunError, atomic_write, fail_point_after, is_at, is_shared, open_plain, sync_parent};

/// How far `metrics.jsonl` was when a checkpoint was about to be written.
///
/// The checkpoint itself counts records alone: they hold timings, so that their bytes differ between equal runs, and equal
/// states must give equal checkpoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetricsMark {
    /// Records so far, as the checkpoint counts them.
    pub records: u64,
    /// The length of the file.
    pub bytes: u64,
    /// BLAKE3 of that beginning of the file, in hexadecimal.
    pub blake3: String,
}

impl MetricsMark {
    /// Where the file has no record yet.
    pub fn begin() -> MetricsMark {
        MetricsMark::of(0, 0, &blake3::Hasher::new())
    }

    fn of(records: u64, bytes: u64, hasher: &blake3::Hasher) -> MetricsMark {
        MetricsMark { records, bytes, blake3: hasher.finalize().to_hex().to_string() }
    }

    /// Reads on to the mark; whether all is as it was written.
    fn is_reached(&self, reader: &mut impl Read, hasher: &mut blake3::Hasher) -> io::Result<bool> {
        let missing = self.bytes.saturating_sub(hasher.count());
        hasher.update_reader(reader.take(missing))?;
        Ok(hasher.count() == self.bytes && hasher.finalize().to_hex().as_str() == self.blake3)
    }
}

/// What `metrics.marks.json` holds: a mark for each checkpoint, in ascending order.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(super) struct Marks {
    pub(super) marks: Vec<MetricsMark>,
}

impl Marks {
    /// The mark of so many records.
    pub(super) fn at(&self, records: u64) -> Option<MetricsMark> {
        match records {
            0 => Some(MetricsMark::begin()),
            records => self.marks.iter().find(|mark| mark.records == records).cloned(),
        }
    }

    /// The last mark up to which the file is as it was written, and the first beyond which it is not.
    fn split(&self, file: &mut File) -> io::Result<(MetricsMark, Option<&MetricsMark>)> {
        file.rewind()?;
        let mut hasher = blake3::Hasher::new();
        let mut good = MetricsMark::begin();
        for mark in &self.marks {
            if !mark.is_reached(file, &mut hasher)? {
                return Ok((good, Some(mark)));
            }
            good = mark.clone();
        }
        Ok((good, None))
    }
}

/// The writer of `metrics.jsonl`: whole lines only, one JSON record each.
///
/// A resumed run opens the file at the mark of its checkpoint: a torn last line and records past the checkpoint are cut off,
/// and will be written again. A file that is not as it was written up to there is refused, and nothing of it is lost.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
    records: u64,
    hasher: blake3::Hasher,
}

impl Metrics {
    /// Opens or creates the file and cuts off what is after the mark.
    pub(super) fn open(path: &Path, at: &MetricsMark, marks: &Marks) -> Result<Metrics, RunError> {
        let reading = |source| RunError::reading("metrics", path, source);
        let writing = |source| RunError::writing("metrics", path, source);
        let is_new = !path.exists();
        let mut options = OpenOptions::new();
        let opened = open_plain(path, options.read(true).append(true).create(at.bytes == 0));
        let mut file = opened.map_err(|error| gone(path, error))?;
        let mut hasher = blake3::Hasher::new();
        if !at.is_reached(&mut file, &mut hasher).map_err(reading)? {
            return Err(fault(path, &mut file, at, marks));
        }
        Tail::of(&file).map_err(reading)?.log(path);
        if is_shared(&file).map_err(reading)? {
            // Such as a copy of the directory that is made of links to the same files.
            file.rewind().map_err(reading)?;
            atomic_write(path, "metrics", |out| io::copy(&mut (&file).take(at.bytes), out))?;
            file = open_plain(path, OpenOptions::new().append(true)).map_err(writing)?;
        }
        file.set_len(at.bytes).map_err(writing)?;
        if is_new {
            sync_parent(path).map_err(writing)?;
        }
        Ok(Metrics { path: path.to_owned(), file, records: at.records, hasher })
    }

    /// Appends one record as one line.
    ///
    /// If that fails half way, for one on a full disk, the half line is taken back.
    pub fn append(&mut self, record: &impl Serialize) -> Result<(), RunError> {
        let written = serde_json::to_vec(record).map_err(io::Error::from).and_then(|mut line| {
            line.push(b'\n');
            fail_point_after("metrics", "append", || {
                let _ = self.file.write_all(&line[..line.len() / 2]);
            });
            self.file.write_all(&line)?;
            Ok(line)
        });
        match written {
            Ok(line) => {
                self.hasher.update(&line);
                self.records += 1;
                Ok(())
            }
            Err(source) => {
                // The first error is the one to report.
                let _ = self.file.set_len(self.hasher.count());
                Err(RunError::writing("metrics", &self.path, source))
            }
        }
    }

    /// The number of records so far, to be stored in a checkpoint.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// Makes the records so far last, and says where the file is with them; call it before a checkpoint that counts them
    /// is written, and hand the mark to [`RunDir::mark_metrics`](super::RunDir::mark_metrics).
    ///
    /// # Errors
    /// It cannot be written, or is not the file at its path any more.
    pub fn sync(&self) -> Result<MetricsMark, RunError> {
        if !is_at(&self.file, &self.path).map_err(|source| RunError::reading("metrics", &self.path, source))? {
            return Err(RunError::Removed { path: self.path.clone() });
        }
        self.file.sync_data().map_err(|source| RunError::writing("metrics", &self.path, source))?;
        Ok(MetricsMark::of(self.records, self.hasher.count(), &self.hasher))
    }
}

/// Checks that the file is as it was written up to a mark. Gives what is after it.
pub(super) fn check(path: &Path, at: &MetricsMark, marks: &Marks) -> Result<Tail, RunError> {
    let reading = |source| RunError::reading("metrics", path, source);
    if at.bytes == 0 && !path.exists() {
        return Ok(Tail::default());
    }
    let mut file = open_plain(path, OpenOptions::new().read(true)).map_err(|error| gone(path, error))?;
    match at.is_reached(&mut file, &mut blake3::Hasher::new()).map_err(reading)? {
        true => Tail::of(&file).map_err(reading),
        false => Err(fault(path, &mut file, at, marks)),
    }
}

/// What is after a mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Tail {
    /// Whole records.
    pub(super) records: u64,
    /// Whether something that is no record follows, or is among them.
    pub(super) torn: bool,
}

impl Tail {
    /// Of a file that was read up to the mark.
    fn of(file: &File) -> io::Result<Tail> {
        let mut tail = Tail::default();
        let mut reader = BufReader::new(file);
        let mut line = Vec::new();
        loop {
            line.clear();
            match reader.read_until(b'\n', &mut line)? {
                0 => return Ok(tail),
                _ if record(&line).is_some() => tail.records += 1,
                _ => tail.torn = true,
            }
        }
    }

    fn log(self, path: &Path) {
        let path = path.display();
        match self {
            Tail { records: 0, torn: false } => {}
            Tail { records, torn: false } => {
                tracing::info!(
                    "{path}: {records} records after the last checkpoint are cut off, and will be made again"
                );
            }
            Tail { records: 0, torn: true } => tracing::warn!("{path}: a torn line at its end is cut off"),
            Tail { records, torn: true } => tracing::warn!(
                "{path}: what follows the last checkpoint is cut off: {records} records, which will be made again, and a \
                 torn line"
            ),
        }
    }
}

/// A line as a record.
pub(super) fn record(line: &[u8]) -> Option<Value> {
    let value = serde_json::from_slice(line.strip_suffix(b"\n")?).ok()?;
    matches!(value, Value::Object(_)).then_some(value)
}

fn gone(path: &Path, error: io::Error) -> RunError {
    match error.kind() {
        io::ErrorKind::NotFound => RunError::damaged(path, "it is gone"),
        _ => RunError::reading("metrics", path, error),
    }
}

/// What is wrong with a file that is not as it was written up to a mark.
fn fault(path: &Path, file: &mut File, at: &MetricsMark, marks: &Marks) -> RunError {
    match first_fault(file, at, marks) {
        Ok(reason) => RunError::damaged(path, reason),
        Err(error) => RunError::reading("metrics", path, error),
    }
}

fn first_fault(file: &mut File, at: &MetricsMark, marks: &Marks) -> io::Result<String> {
    let (good, bad) = marks.split(file)?;
    file.rewind()?;
    let mut reader = BufReader::new(file);
    let (mut line, mut before) = (Vec::new(), Vec::new());
    let mut update: Option<(String, u64)> = None;
    let (mut number, mut good_lines, mut bytes) = (0, 0, 0);
    while bytes < at.bytes {
        std::mem::swap(&mut line, &mut before);
        line.clear();
        let length = reader.read_until(b'\n', &mut line)? as u64;
        if length == 0 {
            return Ok(format!(
                "it ends after line {number}, and the checkpoint was made after {} records",
                at.records
            ));
        }
        (number, bytes) = (number + 1, bytes + length);
        let is_good = bytes <= good.bytes;
        good_lines += u64::from(is_good);
        let Some(now) = record(&line) else {
            return Ok(format!("line {number} is no record"));
        };
        if !is_good && line == before {
            return Ok(format!("line {number} is line {} again", number - 1));
        }
        let Some((stage, step)) = step_of(&now) else { continue };
        match &update {
            _ if is_good => {}
            Some((same, before)) if *same == stage && before.checked_add(1) != Some(step) => {
                return Ok(format!("in line {number}, step {step} follows step {before}"));
            }
            Some((same, _)) if *same == stage => {}
            _ if step > 0 => return Ok(format!("in line {number}, stage `{stage}` begins with step {step}")),
            _ => {}
        }
        update = Some((stage, step));
    }
    let last = bad.map_or(at.records, |bad| bad.records.saturating_sub(good.records).saturating_add(good_lines));
    Ok(format!("something in lines {} to {last} is not as it was written", good_lines + 1))
}

/// Where a run stood at a checkpoint, or at the end of a stage.
pub(super) struct Stood {
    pub(super) records: u64,
    pub(super) stage: String,
    pub(super) step: u64,
}

/// What is valid in a damaged file.
pub(super) struct Salvaged {
    /// Its lines.
    pub(super) text: Vec<u8>,
    /// How far these are at each of the places where the run stood.
    pub(super) marks: Marks,
    /// So many records are missing up to the last of them.
    pub(super) lost: u64,
}

/// Takes from a damaged file the lines that are records, each once, and tells by their stages and steps where they belong.
///
/// `stood` is in ascending order of records.
pub(super) fn salvage(path: &Path, stood: &[Stood]) -> Result<Salvaged, RunError> {
    let reading = |source| RunError::reading("metrics", path, source);
    let mut reader: Box<dyn BufRead> = match open_plain(path, OpenOptions::new().read(true)) {
        Ok(file) => Box::new(BufReader::new(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Box::new(io::empty()),
        Err(error) => return Err(reading(error)),
    };
    let mut text = Vec::new();
    let mut kept: Vec<(String, u64, usize)> = Vec::new();
    let mut known = BTreeSet::new();
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line).map_err(reading)? > 0 {
        if let Some(now) = record(&line)
            && let Some(stage) = now["stage"].as_str()
        {
            let is_update = now.get("loss").is_some();
            // Results of a stage without steps have none.
            let step = now["step"].as_u64().unwrap_or(0);
            if known.insert((stage.to_owned(), step, paths(&now))) {
                text.extend_from_slice(&line);
                // What an update is counted by is the step before it; what is measured, the step after which it is.
                kept.push((stage.to_owned(), step.saturating_add(u64::from(is_update)), text.len()));
            }
        }
        line.clear();
    }
    let (mut marks, mut lines) = (Marks::default(), 0);
    for at in stood {
        let last = kept.iter().rposition(|(stage, done, _)| *stage == at.stage && *done <= at.step);
        lines = last.map_or(lines, |last| lines.max(last + 1));
        let bytes = if lines == 0 { 0 } else { kept[lines - 1].2 };
        let mut hasher = blake3::Hasher::new();
        hasher.update(&text[..bytes]);
        marks.marks.push(MetricsMark::of(at.records, bytes as u64, &hasher));
    }
    let lost = stood.last().map_or(0, |last| last.records.saturating_sub(lines as u64));
    Ok(Salvaged { text, marks, lost })
}

/// The paths of all numbers of a record: what tells records of one step, and the rows of a result, apart.
fn paths(record: &Value) -> Vec<String> {
    let (mut paths, mut open) = (Vec::new(), vec![(String::new(), record)]);
    while let Some((path, value)) = open.pop() {
        match value {
            Value::Object(entries) => {
                open.extend(entries.iter().map(|(name, value)| (format!("{path}/{name}"), value)));
            }
            _ => paths.push(path),
        }
    }
    paths
}

/// The stage and the step of an update's record.
fn step_of(record: &Value) -> Option<(String, u64)> {
    record.get("loss")?;
    Some((record.get("stage")?.as_str()?.to_owned(), record.get("step")?.as_u64()?))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    fn line(step: u64) -> Value {
        json!({ "stage": "train", "step": step, "loss": 0.5 })
    }

    fn text(steps: impl IntoIterator<Item = u64>) -> String {
        steps.into_iter().map(|step| format!("{}\n", line(step))).collect::<Vec<_>>().concat()
    }

    /// A file of steps, with a mark after each second one.
    fn written(path: &Path, steps: u64) -> Marks {
        let mut marks = Marks::default();
        let mut metrics = Metrics::open(path, &MetricsMark::begin(), &marks).unwrap();
        for step in 0..steps {
            metrics.append(&line(step)).unwrap();
            if step % 2 == 1 {
                marks.marks.push(metrics.sync().unwrap());
            }
        }
        marks
    }

    #[test]
    fn a_resumed_file_has_no_torn_and_no_doubled_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let marks = written(&path, 3);
        let mut torn = fs::read(&path).unwrap();
        torn.extend_from_slice(b"{\"step\":4,\"lo");
        fs::write(&path, torn).unwrap();
        let at = marks.at(2).unwrap();
        assert_eq!(check(&path, &at, &marks).unwrap(), Tail { records: 1, torn: true });

        let mut metrics = Metrics::open(&path, &at, &marks).unwrap();
        for step in 2..5 {
            metrics.append(&line(step)).unwrap();
        }
        assert_eq!(metrics.records(), 5);
        assert_eq!(fs::read_to_string(&path).unwrap(), text(0..5));
        let again = metrics.sync().unwrap();
        assert_eq!(check(&path, &again, &marks).unwrap(), Tail::default());
    }

    #[test]
    fn a_run_without_a_checkpoint_begins_its_metrics_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        fs::write(&path, "{\"step\":0}\n{\"st").unwrap();
        assert_eq!(Metrics::open(&path, &MetricsMark::begin(), &Marks::default()).unwrap().records(), 0);
        assert_eq!(fs::read(&path).unwrap(), b"");
    }

    /// The place is named, and the file is left as it is: what is valid in it is kept.
    #[test]
    fn a_line_that_is_deleted_doubled_or_changed_is_noticed_and_nothing_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let marks = written(&path, 8);
        let whole = fs::read_to_string(&path).unwrap();
        let nul = whole.replacen("\"step\":4", "\"step\u{0}:4", 1);
        for (changed, says) in [
            (text([0, 1, 3, 4, 5, 6, 7]), "in line 3, step 3 follows step 1"),
            (text([1, 2, 3, 4, 5, 6, 7]), "in line 1, stage `train` begins with step 1"),
            (text([0, 1, 2, 2, 3, 4, 5, 6, 7]), "line 4 is line 3 again"),
            (text([0, 1, 3, 2, 4, 5, 6, 7]), "in line 3, step 3 follows step 1"),
            (text([0, 1, 2, 3, 4]), "it ends after line 5, and the checkpoint was made after 8"),
            (nul, "line 5 is no record"),
            (whole.replacen("\"step\":4", "\"step\":4 ", 1), "something in lines 5 to 6"),
            (whole.replacen("0.5", "0.6", 1), "something in lines 1 to 2"),
            (whole.replacen('\n', "\n\n", 1), "line 2 is no record"),
            (whole.replacen('\n', "", 1), "line 1 is no record"),
            (whole.replace('\n', "\r\n"), "something in lines 1 to 2"),
            (String::new(), "it ends after line 0"),
        ] {
            fs::write(&path, &changed).unwrap();
            let at = marks.at(8).unwrap();
            for error in [Metrics::open(&path, &at, &marks).map(drop), check(&path, &at, &marks).map(drop)] {
                let error = error.unwrap_err();
                assert!(error.is_user_mistake() && error.to_string().contains(says), "{says}: {error}");
            }
            assert_eq!(fs::read_to_string(&path).unwrap(), changed);
        }
        fs::remove_file(&path).unwrap();
        let error = Metrics::open(&path, &marks.at(8).unwrap(), &marks).unwrap_err().to_string();
        assert!(error.contains("it is gone") && !path.exists(), "{error}");
    }

    /// As `cp -al` makes a copy of a directory.
    #[cfg(unix)]
    #[test]
    fn a_file_with_a_second_name_is_not_changed_under_that() {
        let folder = tempfile::tempdir().unwrap();
        let (path, copy) = (folder.path().join("metrics.jsonl"), folder.path().join("copy"));
        let marks = written(&path, 4);
        fs::hard_link(&path, &copy).unwrap();
        let mut metrics = Metrics::open(&path, &marks.at(2).unwrap(), &marks).unwrap();
        metrics.append(&line(2)).unwrap();
        metrics.sync().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), text(0..3));
        assert_eq!(fs::read_to_string(&copy).unwrap(), text(0..4));
    }

    #[cfg(unix)]
    #[test]
    fn a_file_that_is_removed_or_replaced_meanwhile_is_not_relied_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        for replaced in [false, true] {
            let _ = fs::remove_file(&path);
            let mut metrics = Metrics::open(&path, &MetricsMark::begin(), &Marks::default()).unwrap();
            metrics.append(&line(0)).unwrap();
            fs::remove_file(&path).unwrap();
            if replaced {
                fs::write(&path, text([0])).unwrap();
            }
            assert!(matches!(metrics.sync(), Err(RunError::Removed { .. })));
        }
    }

    #[test]
    fn what_is_valid_in_a_damaged_file_is_kept_once_and_where_it_belongs() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let measured = "{\"stage\":\"train\",\"step\":4,\"knn\":{}}\n";
        let other = "{\"stage\":\"tune\",\"step\":0,\"loss\":0.5}\n";
        let damaged =
            [&text([0, 0]), "garbled\n", &text([3]), measured, &text([4, 5]), other, "{\"stage\":\"tu"].concat();
        fs::write(&path, damaged).unwrap();
        let at = |records, stage: &str, step| Stood { records, stage: stage.into(), step };
        let stood = [at(2, "train", 2), at(5, "train", 4), at(7, "train", 6), at(8, "tune", 1), at(8, "knn", 0)];
        let Salvaged { text: kept, marks, lost } = salvage(&path, &stood).unwrap();
        let expected = [&text([0, 3]), measured, &text([4, 5]), other].concat();
        assert_eq!(String::from_utf8(kept).unwrap(), expected);
        let lines: Vec<usize> =
            marks.marks.iter().map(|mark| expected[..mark.bytes as usize].lines().count()).collect();
        assert_eq!((lines, lost), (vec![1, 3, 5, 6, 6], 2));
        fs::write(&path, &expected).unwrap();
        for mark in &marks.marks {
            check(&path, mark, &marks).unwrap();
        }
        let gone = salvage(&folder.path().join("gone"), &stood).unwrap();
        assert_eq!((gone.text.len(), gone.lost), (0, 8));
    }

    #[test]
    fn rows_of_a_result_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let row = |level: usize| format!("{}\n", json!({ "stage": "knn", "student": { level.to_string(): 0.5 } }));
        fs::write(&path, [row(0), row(1), row(0), "garbled\n".into()].concat()).unwrap();
        let stood = [Stood { records: 2, stage: "knn".into(), step: 0 }];
        let Salvaged { text, lost, .. } = salvage(&path, &stood).unwrap();
        assert_eq!((String::from_utf8(text).unwrap(), lost), (row(0) + &row(1), 0));
    }

    #[test]
    fn what_is_damaged_after_a_mark_does_not_count_up_to_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let marks = written(&path, 8);
        fs::write(&path, text([0, 1, 2, 3, 4, 6, 7])).unwrap();
        assert!(check(&path, &marks.at(6).unwrap(), &marks).is_err());
        assert_eq!(check(&path, &marks.at(4).unwrap(), &marks).unwrap(), Tail { records: 3, torn: false });
    }
}
