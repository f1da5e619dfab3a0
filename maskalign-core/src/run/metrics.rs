//! The writer of `metrics.jsonl`.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::IgnoredAny;

use crate::files::RunError;
use crate::files::fail_point_after;

/// The writer of `metrics.jsonl`: whole lines only, one JSON record each.
///
/// A checkpoint stores [`Metrics::records`], and a resumed run opens the file with that number: a torn last line and
/// records past the checkpoint are cut off, and will be written again. A number of records, not of bytes: records hold
/// timings, so bytes differ between equal runs, and equal states must give equal checkpoints.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
    bytes: u64,
    records: u64,
}

impl Metrics {
    /// Opens or creates the file and keeps its first `records` records.
    ///
    /// Where the file holds fewer whole records (lost in a power failure, or edited), all of them are kept and a warning
    /// is logged.
    pub fn open(path: &Path, records: u64) -> Result<Metrics, RunError> {
        let writing = |source| RunError::writing("metrics", path, source);
        let (kept, bytes) = match File::open(path) {
            Ok(file) => whole_records(file, records).map_err(|e| RunError::reading("metrics", path, e))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => (0, 0),
            Err(error) => return Err(RunError::reading("metrics", path, error)),
        };
        if kept < records {
            tracing::warn!("{} holds {kept} whole records where {records} were expected", path.display());
        }
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(writing)?;
        file.set_len(bytes).map_err(writing)?;
        Ok(Metrics { path: path.to_owned(), file, bytes, records: kept })
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
            Ok(line.len() as u64)
        });
        match written {
            Ok(length) => {
                self.bytes += length;
                self.records += 1;
                Ok(())
            }
            Err(source) => {
                // The first error is the one to report.
                let _ = self.file.set_len(self.bytes);
                Err(RunError::writing("metrics", &self.path, source))
            }
        }
    }

    /// The number of records so far, to be stored in a checkpoint.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// Makes the records so far last; call it before a checkpoint that counts them is written.
    pub fn sync(&self) -> Result<(), RunError> {
        self.file.sync_data().map_err(|source| RunError::writing("metrics", &self.path, source))
    }
}

/// The number and the length in bytes of the leading whole records, at most `limit`.
fn whole_records(file: File, limit: u64) -> io::Result<(u64, u64)> {
    let mut reader = BufReader::new(file);
    let (mut records, mut bytes) = (0, 0);
    let mut line = Vec::new();
    while records < limit {
        line.clear();
        let length = reader.read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') || serde_json::from_slice::<IgnoredAny>(&line).is_err() {
            break;
        }
        records += 1;
        bytes += length as u64;
    }
    Ok((records, bytes))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    #[test]
    fn a_resumed_file_has_no_torn_and_no_doubled_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut metrics = Metrics::open(&path, 0).unwrap();
        for step in 0..3 {
            metrics.append(&json!({ "step": step })).unwrap();
        }
        let at_checkpoint = metrics.records();
        metrics.append(&json!({ "step": 3 })).unwrap();
        metrics.sync().unwrap();
        drop(metrics);
        let mut torn = fs::read(&path).unwrap();
        torn.extend_from_slice(b"{\"step\":4,\"lo");
        fs::write(&path, torn).unwrap();

        let mut metrics = Metrics::open(&path, at_checkpoint).unwrap();
        for step in 3..5 {
            metrics.append(&json!({ "step": step })).unwrap();
        }
        assert_eq!(metrics.records(), 5);
        let expected: Vec<String> = (0..5).map(|step| format!("{{\"step\":{step}}}\n")).collect();
        assert_eq!(fs::read_to_string(&path).unwrap(), expected.concat());
    }

    #[test]
    fn a_run_without_a_checkpoint_begins_its_metrics_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        fs::write(&path, "{\"step\":0}\n{\"st").unwrap();
        assert_eq!(Metrics::open(&path, 0).unwrap().records(), 0);
        assert_eq!(fs::read(&path).unwrap(), b"");
    }

    #[test]
    fn fewer_records_than_the_checkpoint_counted_are_all_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        fs::write(&path, "{\"step\":0}\n\0\0\0\n{\"step\":2}\n").unwrap();
        assert_eq!(Metrics::open(&path, 3).unwrap().records(), 1);
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":0}\n");
    }
}
