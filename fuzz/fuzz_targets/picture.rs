//! Picture files of every format, JPEG first.
#![no_main]

use std::path::Path;

use pixelcnn::picture::decode;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    for exactly in [false, true] {
        if let Ok(picture) = decode(bytes, Path::new("fuzzed"), [8, 8, 3], exactly) {
            assert_eq!(picture.levels.len(), 8 * 8 * 3);
        }
    }
});
