//! `tensorboard/`: the numbers of `metrics.jsonl` as scalars for TensorBoard.
//!
//! One file a run. The stage stands before the first slash of a tag (`pretrain/loss`, `pretrain/knn/accuracy`), by which
//! TensorBoard groups its charts; so the steps of two stages, which both count from 0, never share a chart. A file of
//! their own for each stage would list each run several times where runs are compared.
//!
//! After the record of its version, the file has one record for each line of `metrics.jsonl`, and between them the images
//! that stages show. A run that goes on is cut back to its checkpoint like that file, to the byte. TensorBoard's own remedy, a mark that tells it to forget later
//! steps, forgets them in every stage, and other readers of the format do not know it.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use crc::{CRC_32_ISCSI, Crc};
use serde_json::{Value, json};

use super::{Drawing, Evaluation, Event, Mark, Picture, Sink, metrics::result_record};
use crate::{
    error::Result,
    files::{atomic_write, create_folders, is_plain_folder, is_shared, open_plain, sync_parent},
    run::{RunDir, RunError},
};

static CRC32C: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);
/// Bytes around a record's content: its length, the checksum of that, and the checksum of the content.
const FRAME: usize = 8 + 4 + 4;

/// The event file of a run directory. It follows [`MetricsFile`](super::MetricsFile) in the list of sinks: what was
/// recorded before this sink was there is read from `metrics.jsonl`.
pub struct TensorBoardFile<'a> {
    dir: &'a RunDir,
    file: Option<EventFile>,
    /// The step that the next picture belongs to.
    step: u64,
}

impl<'a> TensorBoardFile<'a> {
    /// The sink of a directory; nothing is opened yet.
    pub fn new(dir: &'a RunDir) -> Self {
        TensorBoardFile { dir, file: None, step: 0 }
    }

    fn append(&mut self, message: &Message) -> Result<()> {
        let file = match self.file.take() {
            Some(file) => file,
            None => EventFile::open(&self.dir.tensorboard_path(), &[], "")?,
        };
        Ok(self.file.insert(file).append(message)?)
    }

    /// A line of `metrics.jsonl`.
    fn line(&mut self, line: &Value) -> Result<()> {
        self.step = line["step"].as_u64().unwrap_or_default();
        self.append(&scalars(line))
    }

    /// An image; TensorBoard takes no charts.
    fn image(&mut self, picture: &Picture) -> Result<()> {
        let Picture { stage, name, drawing, .. } = picture;
        let Drawing::Image(image) = drawing else { return Ok(()) };
        let file = picture.png(image)?;
        let (width, height) = image.size();
        // The number of colours, then the file.
        let image = Message::default().varint(1, height as u64).varint(2, width as u64).varint(3, 3).bytes(4, &file);
        let value = Message::default().bytes(1, format!("{stage}/{name}").as_bytes()).bytes(4, &image.0);
        self.append(&Message::default().varint(2, self.step).bytes(5, &Message::default().bytes(1, &value.0).0))
    }
}

impl Sink for TensorBoardFile<'_> {
    fn handle(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::StageStarted { .. } => {
                self.step = 0;
                Ok(())
            }
            Event::Step(report) => self.line(&json!(report)),
            Event::Evaluated(Evaluation { stage, step, name, result, .. }) => {
                self.line(&json!({ "stage": stage, "step": step, name: result }))
            }
            Event::Result { stage, result } => self.line(&result_record(stage, result)),
            Event::Picture(picture) => self.image(picture),
            _ => Ok(()),
        }
    }

    fn rewind(&mut self, to: Mark) -> Result<()> {
        // Closed first: the file is opened again at another length.
        self.file = None;
        let lines = first_lines(&self.dir.metrics_path(), to.records)?;
        self.file = Some(EventFile::open(&self.dir.tensorboard_path(), &lines, to.stage)?);
        self.step = to.step;
        Ok(())
    }

    fn takes_pictures(&self) -> bool {
        true
    }

    fn sync(&mut self) -> Result<()> {
        Ok(self.file.as_ref().map_or(Ok(()), EventFile::sync)?)
    }
}

/// The first lines of `metrics.jsonl`; fewer where it has fewer.
fn first_lines(path: &Path, count: u64) -> Result<Vec<Value>, RunError> {
    let reading = |error| RunError::reading("metrics", path, error);
    let file = match open_plain(path, OpenOptions::new().read(true)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(reading(error)),
    };
    let parse = |line: io::Result<String>| serde_json::from_str(&line?).map_err(io::Error::from);
    BufReader::new(file).lines().take(count as usize).map(parse).collect::<io::Result<_>>().map_err(reading)
}

/// A file of events that is appended to.
struct EventFile {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl EventFile {
    /// Opens or creates the file so that it has the scalars of these lines and no more: whole records that are there
    /// stay, a torn one and those beyond go, and missing ones are added. Images between them stay too, and behind them those
    /// of other stages than `stage`, which will show its own again.
    fn open(path: &Path, lines: &[Value], stage: &str) -> Result<EventFile, RunError> {
        let writing = |source| RunError::writing("TensorBoard file", path, source);
        let reading = |source| RunError::reading("TensorBoard file", path, source);
        let folder = path.parent().expect("a file in a folder");
        if !is_plain_folder(folder).map_err(|error| RunError::folder(folder, error))? {
            create_folders(folder).map_err(writing)?;
        }
        let mut options = OpenOptions::new();
        let mut file = open_plain(path, options.create(true).read(true).append(true)).map_err(writing)?;
        let mut found = Vec::new();
        file.read_to_end(&mut found).map_err(reading)?;
        let (records, bytes) = whole_records(&found, 1 + lines.len(), stage);
        if is_shared(&file).map_err(reading)? {
            // Such as a copy of the directory that is made of links to the same files.
            atomic_write(path, "TensorBoard file", |out| out.write_all(&found[..bytes]))?;
            file = open_plain(path, OpenOptions::new().append(true)).map_err(writing)?;
        }
        sync_parent(path).map_err(writing)?;
        file.set_len(bytes as u64).map_err(writing)?;
        let mut file = EventFile { path: path.to_owned(), file, bytes: bytes as u64 };
        if records == 0 {
            // The first record tells readers which version of the format follows.
            file.append(&Message::default().bytes(3, b"brain.Event:2"))?;
        }
        lines.iter().skip(records.saturating_sub(1)).try_for_each(|line| file.append(&scalars(line)))?;
        Ok(file)
    }

    /// Appends an event that happens now. If that fails half way, the half is taken back.
    fn append(&mut self, content: &Message) -> Result<(), RunError> {
        #[expect(clippy::disallowed_methods, reason = "TensorBoard's axis of time; nothing is computed from it")]
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
        let mut event = Message::default().double(1, now);
        event.0.extend_from_slice(&content.0);
        let record = framed(&event.0);
        match self.file.write_all(&record) {
            Ok(()) => {
                self.bytes += record.len() as u64;
                Ok(())
            }
            Err(source) => {
                // The first error is the one to report.
                let _ = self.file.set_len(self.bytes);
                Err(RunError::writing("TensorBoard file", &self.path, source))
            }
        }
    }

    fn sync(&self) -> Result<(), RunError> {
        self.file.sync_data().map_err(|source| RunError::writing("TensorBoard file", &self.path, source))
    }
}

/// Step and summary of a line of `metrics.jsonl`: each of its numbers under the stage and its path, but for the epoch,
/// which the step tells.
fn scalars(line: &Value) -> Message {
    let stage = line["stage"].as_str().unwrap_or_default();
    let mut summary = Message::default();
    let mut open: Vec<(String, &Value)> = Vec::new();
    for (name, value) in line.as_object().into_iter().flatten() {
        if !["stage", "step", "epoch"].contains(&name.as_str()) {
            open.push((format!("{stage}/{name}"), value));
        }
    }
    while let Some((tag, value)) = open.pop() {
        match value {
            Value::Object(inner) => open.extend(inner.iter().map(|(name, value)| (format!("{tag}/{name}"), value))),
            value => {
                if let Some(number) = value.as_f64() {
                    let value = Message::default().bytes(1, tag.as_bytes()).float(2, number as f32);
                    summary = summary.bytes(1, &value.0);
                }
            }
        }
    }
    Message::default().varint(2, line["step"].as_u64().unwrap_or_default()).bytes(5, &summary.0)
}

/// A message of Protocol Buffers under construction: the few types that TensorBoard's `Event` is made of.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(mut self, field: u8, value: u64) -> Self {
        self.0.push(field << 3);
        self.push_varint(value);
        self
    }

    fn double(mut self, field: u8, value: f64) -> Self {
        self.0.push(field << 3 | 1);
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn bytes(mut self, field: u8, value: &[u8]) -> Self {
        self.0.push(field << 3 | 2);
        self.push_varint(value.len() as u64);
        self.0.extend_from_slice(value);
        self
    }

    fn float(mut self, field: u8, value: f32) -> Self {
        self.0.push(field << 3 | 5);
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn push_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

/// A record of TensorFlow's: length and content, each with its checksum.
fn framed(content: &[u8]) -> Vec<u8> {
    let length = (content.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(FRAME + content.len());
    record.extend_from_slice(&length);
    record.extend_from_slice(&checksum(&length));
    record.extend_from_slice(content);
    record.extend_from_slice(&checksum(content));
    record
}

/// CRC-32C, rotated and moved by a constant: TensorFlow keeps checksums apart from what they are computed of.
fn checksum(bytes: &[u8]) -> [u8; 4] {
    CRC32C.checksum(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// The number of the leading whole records but for images, at most `limit`, and the length in bytes of all of them. An image
/// behind the last stays if another stage than `stage` showed it.
fn whole_records(file: &[u8], limit: usize, stage: &str) -> (usize, usize) {
    let (mut records, mut bytes) = (0, 0);
    while let Some(length) = whole_record(&file[bytes..]) {
        let content = &file[bytes + FRAME - 4..bytes + length - 4];
        match image_tag(content).map(|tag| tag.split_once('/').map_or(tag, |(stage, _)| stage)) {
            Some(shown_by) if records == limit && shown_by == stage => break,
            None if records == limit => break,
            Some(_) => {}
            None => records += 1,
        }
        bytes += length;
    }
    (records, bytes)
}

/// The tag of an event that is an image.
fn image_tag(event: &[u8]) -> Option<&str> {
    let value = field(field(event, 5)?, 1)?;
    field(value, 4)?;
    std::str::from_utf8(field(value, 1)?).ok()
}

/// The first field of bytes with this number, of a message that was written here.
fn field(mut message: &[u8], wanted: u8) -> Option<&[u8]> {
    while let Some((&key, rest)) = message.split_first() {
        message = match key & 7 {
            0 => varint(rest)?.1,
            1 => rest.get(8..)?,
            2 => {
                let (length, rest) = varint(rest)?;
                let (content, rest) = rest.split_at_checked(usize::try_from(length).ok()?)?;
                if key >> 3 == wanted {
                    return Some(content);
                }
                rest
            }
            5 => rest.get(4..)?,
            _ => return None,
        };
    }
    None
}

fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let end = bytes.iter().take(10).position(|byte| byte & 0x80 == 0)?;
    let value = bytes[..=end].iter().rev().fold(0, |value: u64, byte| value << 7 | u64::from(byte & 0x7f));
    Some((value, &bytes[end + 1..]))
}

/// The length of the record that the bytes begin with; nothing where it is torn or damaged.
fn whole_record(bytes: &[u8]) -> Option<usize> {
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let (sum, rest) = rest.split_first_chunk::<4>()?;
    if *sum != checksum(length) {
        return None;
    }
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let (content, rest) = rest.split_at_checked(length)?;
    (*rest.first_chunk::<4>()? == checksum(content)).then_some(FRAME + length)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{
        data::RgbImage,
        events::{Events, MetricsFile, StepReport},
        run::Mode,
    };

    #[test]
    fn checksums_are_those_of_the_rfc() {
        // RFC 3720, appendix B.4.
        let counting: Vec<u8> = (0..32).collect();
        for (bytes, expected) in [(&[0; 32][..], 0x8a91_36aa_u32), (&[0xff; 32], 0x62a8_ab43), (&counting, 0x46dd_794e)]
        {
            assert_eq!(CRC32C.checksum(bytes), expected);
        }
    }

    /// ```python
    /// from tensorboard.compat.proto.event_pb2 import Event
    /// from tensorboard.summary.writer.record_writer import RecordWriter
    /// event = Event(step=300); event.summary.value.add(tag="a/b", simple_value=0.5)
    /// RecordWriter(open("f", "wb")).write(event.SerializeToString())
    /// ```
    #[test]
    fn a_record_is_the_one_that_tensorboard_writes() {
        let message = scalars(&json!({ "stage": "a", "step": 300, "epoch": 1.0, "b": 0.5 }));
        let hex: Vec<String> = framed(&message.0).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex.concat(), "11000000000000009d6db52e10ac022a0c0a0a0a03612f62150000003f204f791e");
    }

    fn report(step: u64) -> StepReport {
        let stage = "pretrain".to_owned();
        let loss = step as f32;
        StepReport {
            stage,
            step,
            steps: 9,
            loss,
            lr: 0.5,
            gradient_norm: 1.0,
            images_per_s: 2.0,
            ..StepReport::default()
        }
    }

    /// Where a run begins: every run rewinds its sinks before its first record.
    const BEGINNING: Mark = Mark { records: 0, stage: "pretrain", step: 0 };

    fn stream(dir: &RunDir) -> Events<'_> {
        Events::new(vec![Box::new(MetricsFile::new(dir)), Box::new(TensorBoardFile::new(dir))])
    }

    /// The events of a file without their times.
    fn contents(dir: &RunDir) -> Vec<Vec<u8>> {
        let mut file = &fs::read(dir.tensorboard_path()).unwrap()[..];
        let mut found = Vec::new();
        while let Some(length) = whole_record(file) {
            found.push(file[12 + 9..length - 4].to_vec());
            file = &file[length..];
        }
        assert!(file.is_empty(), "a torn record");
        found
    }

    fn expected(steps: std::ops::Range<u64>) -> Vec<Vec<u8>> {
        let version = Message::default().bytes(3, b"brain.Event:2").0;
        std::iter::once(version).chain(steps.map(|step| scalars(&json!(report(step))).0)).collect()
    }

    #[test]
    fn a_resumed_run_has_every_step_once() {
        let folder = tempfile::tempdir().unwrap();
        let dir = RunDir::create(folder.path(), Mode::Fresh).unwrap();
        let mut events = stream(&dir);
        events.rewind(BEGINNING).unwrap();
        (0..3).for_each(|step| events.send(Event::Step(&report(step))).unwrap());
        events.sync().unwrap();
        (3..5).for_each(|step| events.send(Event::Step(&report(step))).unwrap());
        drop(events);
        let mut torn = OpenOptions::new().append(true).open(dir.tensorboard_path()).unwrap();
        torn.write_all(&framed(b"half of it")[..13]).unwrap();

        let mut events = stream(&dir);
        events.rewind(Mark { records: 3, stage: "pretrain", step: 3 }).unwrap();
        assert_eq!(contents(&dir), expected(0..3));
        (3..7).for_each(|step| events.send(Event::Step(&report(step))).unwrap());
        assert_eq!(contents(&dir), expected(0..7));
    }

    #[test]
    fn a_run_that_asks_for_it_late_has_its_earlier_steps_too() {
        let folder = tempfile::tempdir().unwrap();
        let dir = RunDir::create(folder.path(), Mode::Fresh).unwrap();
        let mut events = Events::new(vec![Box::new(MetricsFile::new(&dir))]);
        events.rewind(BEGINNING).unwrap();
        (0..4).for_each(|step| events.send(Event::Step(&report(step))).unwrap());
        events.sync().unwrap();
        events.send(Event::Step(&report(4))).unwrap();
        drop(events);
        let mut events = stream(&dir);
        events.rewind(Mark { records: 4, stage: "pretrain", step: 4 }).unwrap();
        events.send(Event::Step(&report(4))).unwrap();
        assert_eq!(contents(&dir), expected(0..5));
    }

    fn picture(stage: &str) -> Picture {
        let drawing = Drawing::Image(RgbImage::black(3, 2));
        Picture { stage: stage.to_owned(), name: "masks".to_owned(), caption: String::new(), drawing }
    }

    /// The tags of images, and in between the number of other records.
    fn shown(dir: &RunDir) -> Vec<String> {
        let tag = |event: &Vec<u8>| image_tag(event).map_or("-".to_owned(), str::to_owned);
        contents(dir).iter().map(tag).collect()
    }

    /// Images count as no line of `metrics.jsonl`, and none is there twice.
    #[test]
    fn images_of_finished_stages_stay_and_others_come_again() {
        let folder = tempfile::tempdir().unwrap();
        let dir = RunDir::create(folder.path(), Mode::Fresh).unwrap();
        let mut events = stream(&dir);
        events.rewind(BEGINNING).unwrap();
        events.send(Event::Step(&report(0))).unwrap();
        events.sync().unwrap();
        events.send(Event::Step(&report(1))).unwrap();
        events.sync().unwrap();
        events.send(Event::Picture(&picture("pretrain"))).unwrap();
        assert_eq!(shown(&dir), ["-", "-", "-", "pretrain/masks"]);
        // The stage ended, and the next one begins.
        events.rewind(Mark { records: 2, stage: "knn", step: 0 }).unwrap();
        events.send(Event::Picture(&picture("knn"))).unwrap();
        assert_eq!(shown(&dir), ["-", "-", "-", "pretrain/masks", "knn/masks"]);
        // It begins again, and then measures.
        events.rewind(Mark { records: 2, stage: "knn", step: 0 }).unwrap();
        events.send(Event::Picture(&picture("knn"))).unwrap();
        events.send(Event::Result { stage: "knn", result: &json!({ "accuracy": 0.5 }) }).unwrap();
        assert_eq!(shown(&dir), ["-", "-", "-", "pretrain/masks", "knn/masks", "-"]);
        // The first stage was killed before it ended after all: it shows its images again.
        events.rewind(Mark { records: 2, stage: "pretrain", step: 2 }).unwrap();
        assert_eq!(shown(&dir), ["-", "-", "-"]);
        events.rewind(Mark { records: 1, stage: "pretrain", step: 1 }).unwrap();
        assert_eq!(contents(&dir), expected(0..1));
    }

    /// ```python
    /// event = Event(step=300); value = event.summary.value.add(tag="a/b")
    /// value.image.height, value.image.width, value.image.colorspace = 2, 3, 3
    /// value.image.encoded_image_string = b"PNG"
    /// ```
    #[test]
    fn an_image_is_found_among_events() {
        let event = b"\x10\xac\x02\x2a\x14\x0a\x12\x0a\x03a/b\x22\x0b\x08\x02\x10\x03\x18\x03\x22\x03PNG";
        assert_eq!(image_tag(event), Some("a/b"));
        let scalar = scalars(&json!({ "stage": "a", "step": 300, "b": 0.5 }));
        assert_eq!((image_tag(&scalar.0), image_tag(&event[..20]), image_tag(b"")), (None, None, None));
    }

    #[test]
    fn evaluations_stand_under_their_names() {
        let line = json!({ "stage": "pretrain", "step": 7, "knn": { "by_k": { "5": 0.25 } } });
        let text = String::from_utf8_lossy(&scalars(&line).0).into_owned();
        assert!(text.contains("pretrain/knn/by_k/5"), "{text}");
    }
}
