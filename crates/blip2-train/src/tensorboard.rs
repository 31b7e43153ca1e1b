//! TensorBoard event files: scalars only.
//!
//! An event file is a row of TFRecords (length, masked CRC-32C of the length, payload, masked CRC-32C of the payload),
//! each payload one `Event` of TensorFlow's protobuf. Four fields of it are all we need, so they are encoded by hand.
//!
//! Like TensorFlow's, a writer makes a new file whenever a run starts; TensorBoard shows the files of a folder as
//! one run. A resumed run says at which step it starts, and TensorBoard then forgets older events from there on.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{Error, Result};

/// Appends scalars to one event file.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: BufWriter<File>,
}

impl EventWriter {
    /// Starts a new event file in `folder`, which is made if missing.
    ///
    /// `first_step`: the first step this run will write, where it resumes an earlier one; `None` for a new run.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder or file can't be made or written.
    pub fn create(folder: &Path, first_step: Option<u64>) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let now = wall_time();
        let (path, file) = new_file(folder, now as u64)?;
        let mut writer = Self { path, file: BufWriter::new(file) };
        writer.append(&Event { wall_time: now, step: 0, what: What::FileVersion })?;
        if let Some(step) = first_step {
            writer.append(&Event { wall_time: now, step, what: What::Started })?;
        }
        writer.flush()?;
        Ok(writer)
    }

    /// Writes scalars of one step, `(tag, value)`, and flushes them. Tags with `/` are grouped by TensorBoard.
    ///
    /// # Errors
    /// [`Error::Io`] if the file can't be written.
    pub fn scalars(&mut self, step: u64, scalars: &[(&str, f32)]) -> Result<()> {
        self.append(&Event { wall_time: wall_time(), step, what: What::Scalars(scalars) })?;
        self.flush()
    }

    /// The file being written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn append(&mut self, event: &Event<'_>) -> Result<()> {
        self.file.write_all(&record(&event.encode())).map_err(Error::io(&self.path))
    }

    fn flush(&mut self) -> Result<()> {
        self.file.flush().map_err(Error::io(&self.path))
    }
}

/// A file that did not exist: TensorBoard reads them in the order of the seconds in their names.
fn new_file(folder: &Path, seconds: u64) -> Result<(PathBuf, File)> {
    let process = std::process::id();
    for serial in 0u32.. {
        let path =
            folder.join(format!("events.out.tfevents.{seconds:010}.blip2.{process}.{serial}"));
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(Error::io(path)(e)),
        }
    }
    unreachable!("4 billion event files in one second")
}

fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// What an event says.
#[derive(Debug, Clone, Copy)]
pub enum What<'a> {
    /// The first event of every file.
    FileVersion,
    /// A run (re)starts: events of this step and later ones in older files are void.
    Started,
    /// Values of one step, `(tag, value)`.
    Scalars(&'a [(&'a str, f32)]),
}

/// One event.
#[derive(Debug, Clone, Copy)]
pub struct Event<'a> {
    /// Seconds since 1970.
    pub wall_time: f64,
    /// The training step.
    pub step: u64,
    /// What it says.
    pub what: What<'a>,
}

impl Event<'_> {
    /// The event as TensorFlow's protobuf `Event`.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0x09]; // 1: wall_time, double
        out.extend(self.wall_time.to_le_bytes());
        if self.step != 0 {
            out.push(0x10); // 2: step, varint
            varint(self.step, &mut out);
        }
        match self.what {
            What::FileVersion => bytes_field(3, b"brain.Event:2", &mut out),
            What::Started => bytes_field(7, &[0x08, 0x01], &mut out), // session_log { status: START }
            What::Scalars(scalars) => bytes_field(5, &summary(scalars), &mut out),
        }
        out
    }
}

/// `Summary { repeated Value { string tag = 1; float simple_value = 2 } value = 1 }`
fn summary(scalars: &[(&str, f32)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (tag, value) in scalars {
        let mut entry = Vec::new();
        bytes_field(1, tag.as_bytes(), &mut entry);
        entry.push(0x15); // 2: simple_value, float
        entry.extend(value.to_le_bytes());
        bytes_field(1, &entry, &mut out);
    }
    out
}

fn bytes_field(number: u8, bytes: &[u8], out: &mut Vec<u8>) {
    out.push(number << 3 | 2);
    varint(bytes.len() as u64, out);
    out.extend(bytes);
}

fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A payload framed as one TFRecord.
pub fn record(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(payload.len() + 16);
    out.extend(length);
    out.extend(masked_crc(&length).to_le_bytes());
    out.extend(payload);
    out.extend(masked_crc(payload).to_le_bytes());
    out
}

/// TFRecord's mask, so that a checksum of data that holds checksums stays sound.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}
