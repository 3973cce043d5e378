//! NumPy's archives: one set of weights under the original's names, `model/conv2d_0/V` and so on.

use std::io::{self, Cursor};
use std::path::Path;

use npyz::WriterBuilder;
use npyz::npz::NpzWriter;
use pixelcnn_core::ModelConfig;
use pixelcnn_core::network::Layout;

use super::{WeightsError, write};

/// Writes `parameters`, in the layout's order, to the `.npz` file `name` in a folder.
///
/// # Errors
/// [`WeightsError::Write`].
pub fn export(
    folder: &Path,
    name: &str,
    config: &ModelConfig,
    parameters: &[Vec<f32>],
) -> Result<(), WeightsError> {
    write(folder, name, |w| {
        let mut file = Cursor::new(Vec::new());
        let mut npz = NpzWriter::new(&mut file);
        let layout = Layout::new(config);
        for (parameter, values) in layout.parameters.iter().zip(parameters) {
            let shape: Vec<u64> = parameter.shape.iter().map(|&n| n as u64).collect();
            let array = npz.array(&parameter.name, Default::default())?;
            let mut array = array.default_dtype().shape(&shape).begin_nd()?;
            array.extend(values)?;
            array.finish()?;
        }
        drop(npz);
        io::Write::write_all(w, file.get_ref())
    })
}
