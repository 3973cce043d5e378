//! TensorBoard's event files: protobuf messages in TFRecord frames.
//!
//! The messages are the few of TensorFlow's `event.proto` and `summary.proto` that scalars, images
//! and restarts need.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use prost::Message;

/// One record of an event file.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    pub(crate) wall_time: f64,
    #[prost(int64, tag = "2")]
    pub(crate) step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    pub(crate) what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Summary {
    #[prost(message, repeated, tag = "1")]
    pub(crate) value: Vec<SummaryValue>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct SummaryValue {
    #[prost(string, tag = "1")]
    pub(crate) tag: String,
    #[prost(oneof = "Value", tags = "2, 4")]
    pub(crate) value: Option<Value>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum Value {
    #[prost(float, tag = "2")]
    SimpleValue(f32),
    #[prost(message, tag = "4")]
    Image(Image),
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Image {
    #[prost(int32, tag = "1")]
    pub(crate) height: i32,
    #[prost(int32, tag = "2")]
    pub(crate) width: i32,
    /// Channels: 1 for grey, 3 for RGB.
    #[prost(int32, tag = "3")]
    pub(crate) colorspace: i32,
    /// A PNG file.
    #[prost(bytes = "vec", tag = "4")]
    pub(crate) encoded_image_string: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct SessionLog {
    #[prost(int32, tag = "1")]
    pub(crate) status: i32,
}

/// `SessionLog.SessionStatus.START`.
const START: i32 = 1;

/// A new event file.
pub(crate) struct EventFile {
    file: File,
    pub(crate) path: PathBuf,
}

impl EventFile {
    /// Creates an event file in `folder` whose first step will be `first_step`: TensorBoard
    /// forgets what earlier files there say of that step and later ones.
    pub(crate) fn create(folder: &Path, first_step: u64) -> io::Result<EventFile> {
        // Readers take the files of a folder in the order of their names.
        let now = since_1970();
        let name = format!(
            "events.out.tfevents.{:010}.{:09}.pixelcnn",
            now.as_secs(),
            now.subsec_nanos()
        );
        let path = folder.join(name);
        let file = File::create_new(&path)?;
        let mut events = EventFile { file, path };
        events.write(0, What::FileVersion("brain.Event:2".into()))?;
        events.write(first_step, What::SessionLog(SessionLog { status: START }))?;
        Ok(events)
    }

    /// Writes values at a step; they are in the file when this returns.
    pub(crate) fn summary(
        &mut self,
        step: u64,
        values: impl IntoIterator<Item = (&'static str, Value)>,
    ) -> io::Result<()> {
        let value = |(tag, value): (&str, Value)| SummaryValue {
            tag: tag.into(),
            value: Some(value),
        };
        let value = values.into_iter().map(value).collect();
        self.write(step, What::Summary(Summary { value }))
    }

    /// Makes what was written so far outlive a power cut.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn write(&mut self, step: u64, what: What) -> io::Result<()> {
        let event = Event {
            wall_time: since_1970().as_secs_f64(),
            step: step.try_into().unwrap_or(i64::MAX),
            what: Some(what),
        };
        self.file.write_all(&frame(&event.encode_to_vec()))
    }
}

fn since_1970() -> Duration {
    SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default()
}

/// A TFRecord: the length, its checksum, the data, their checksum.
fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [
        &length[..],
        &masked_crc(&length).to_le_bytes(),
        data,
        &masked_crc(data).to_le_bytes(),
    ]
    .concat()
}

/// CRC-32C, turned and shifted so that data which hold checksums themselves are safe.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// All events of a file, every frame checked.
    pub(crate) fn events(mut file: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        while !file.is_empty() {
            let (length, rest) = file.split_at(8);
            let (crc, rest) = rest.split_at(4);
            assert_eq!(crc, masked_crc(length).to_le_bytes());
            let length = u64::from_le_bytes(length.try_into().unwrap());
            let (data, rest) = rest.split_at(length as usize);
            let (crc, rest) = rest.split_at(4);
            assert_eq!(crc, masked_crc(data).to_le_bytes());
            events.push(Event::decode(data).unwrap());
            file = rest;
        }
        events
    }

    #[test]
    fn checksums_are_the_known_ones() {
        // RFC 3720, B.4: 32 bytes of zeros; then masked as TensorFlow does.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(masked_crc(&[0; 32]), 0x0fd7_fffa);
    }

    #[test]
    fn events_are_encoded_as_tensorflow_does() {
        // Written by hand after the protocol: field 1 fixed64, 2 varint, 5 > 1 > (1 text, 2 fixed32).
        let event = Event {
            wall_time: 1.5,
            step: 300,
            what: Some(What::Summary(Summary {
                value: vec![SummaryValue {
                    tag: "a".into(),
                    value: Some(Value::SimpleValue(2.0)),
                }],
            })),
        };
        let expected = [
            &[0x09][..],
            &1.5f64.to_le_bytes(),
            &[0x10, 0xac, 0x02],
            &[0x2a, 10, 0x0a, 8, 0x0a, 1, b'a', 0x15],
            &2.0f32.to_le_bytes(),
        ]
        .concat();
        assert_eq!(event.encode_to_vec(), expected);
    }
}
