//! Picture files of every format, JPEG first.
#![no_main]

use std::path::Path;

use pixelcnn::picture::decode;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(picture) = decode(bytes, Path::new("fuzzed"), [8, 8, 3]) {
        assert_eq!(picture.levels.len(), 8 * 8 * 3);
    }
});
