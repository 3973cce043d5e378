//! One image's stream of bytes: range coding, and where it ends.

use constriction::UnwrapInfallible;
use constriction::backends::Cursor;
use constriction::stream::queue::{DefaultRangeDecoder, DefaultRangeEncoder, EncoderSituation};
use constriction::stream::{Decode, Encode};

use super::frequencies::Frequencies;

/// Bytes of a word.
const WORD: usize = size_of::<u32>();

/// The number that stands for the interval \[`lower`, `lower` + `range`) with the fewest bytes: the
/// one that is a multiple of the highest power of 256. It may be 2^64 and more.
fn shortest(lower: u64, range: u64) -> u128 {
    let (lower, end) = (u128::from(lower), u128::from(lower) + u128::from(range));
    let multiples = (0..=64).rev().step_by(8);
    let mut numbers = multiples.map(|bits| lower.next_multiple_of(1 << bits));
    numbers.find(|number| *number < end).unwrap_or(lower)
}

/// Writes a stream.
pub(super) struct Encoder(DefaultRangeEncoder);

impl Encoder {
    pub fn new() -> Encoder {
        Encoder(DefaultRangeEncoder::new())
    }

    pub fn encode(&mut self, level: u8, frequencies: &Frequencies) {
        let encoded = self.0.encode_symbol(level, frequencies);
        encoded.expect("every level has a frequency");
    }

    /// The fewest bytes that a decoder, which reads zeros after them, takes for what was encoded.
    /// The coder's own end would be 4 or 8 bytes that mean the same whatever follows.
    pub fn finish(self) -> Vec<u8> {
        let (mut words, state, situation) = self.0.into_raw_parts();
        let number = shortest(state.lower(), state.range().get());
        // Words are held back where the interval contains a carry into them.
        if let EncoderSituation::Inverted(count, first) = situation {
            let (first, others) = match number >> 64 {
                0 => (first, u32::MAX),
                _ => (first + 1, 0),
            };
            words.push(first);
            words.extend(std::iter::repeat_n(others, count.get() - 1));
        }
        words.extend([(number >> 32) as u32, number as u32]);
        let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_be_bytes).collect();
        let end = bytes.iter().rposition(|byte| *byte != 0);
        bytes.truncate(end.map_or(0, |last| last + 1));
        bytes
    }
}

/// Reads a stream.
pub(super) struct Decoder {
    coder: DefaultRangeDecoder<Cursor<u32, Vec<u32>>>,
    /// Whether the bytes can still be a stream.
    sound: bool,
}

impl Decoder {
    pub fn new(stream: &[u8]) -> Decoder {
        let words = stream.chunks(WORD).map(|chunk| {
            let mut word = [0; WORD];
            word[..chunk.len()].copy_from_slice(chunk);
            u32::from_be_bytes(word)
        });
        let coder = DefaultRangeDecoder::from_compressed(words.collect::<Vec<u32>>());
        Decoder {
            coder: coder.unwrap_infallible(),
            // An encoder leaves out zeros at the end.
            sound: stream.last() != Some(&0),
        }
    }

    /// The next level; zero once the bytes are found not to be a stream.
    pub fn decode(&mut self, frequencies: &Frequencies) -> u8 {
        let level = match self.sound {
            true => self.coder.decode_symbol(frequencies).ok(),
            false => None,
        };
        self.sound = level.is_some();
        level.unwrap_or(0)
    }

    /// Whether the bytes are the ones that an encoder gives for what was decoded: there are no
    /// others for it, so that damage is noticed even where it would change nothing.
    pub fn finish(self) -> bool {
        let (words, state, point) = self.coder.into_raw_parts();
        let (words, position) = words.into_buf_and_pos();
        // Modulo 2^64: a carry is in the words before.
        let number = shortest(state.lower(), state.range().get()) as u64;
        self.sound && position >= words.len() && point == number
    }
}
