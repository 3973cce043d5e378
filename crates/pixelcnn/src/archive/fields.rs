//! Numbers and sums in bytes.

/// Bytes of a sum.
pub(super) const SUM: usize = 4;

/// A number in LEB128.
pub(super) fn varint(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// What is left of some bytes.
pub(super) struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    pub fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    /// A varint of up to 32 bits.
    pub fn number(&mut self) -> Option<u64> {
        self.bits(32)
    }

    /// A varint of up to so many bits.
    pub fn bits(&mut self, bits: u32) -> Option<u64> {
        let mut number = 0u64;
        for shift in (0..bits).step_by(7) {
            let byte = self.take(1)?[0];
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(number).filter(|number| *number >> (bits - 1) >> 1 == 0);
            }
        }
        None
    }
}
