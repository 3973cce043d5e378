//! NumPy's archives: one set of weights under the original's names, `model/conv2d_0/V` and so on.

use std::path::Path;

use pixelcnn_core::ModelConfig;
use pixelcnn_core::network::Layout;

use super::{WeightsError, write};
use crate::numpy::Npz;

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
        let mut npz = Npz::new();
        let layout = Layout::new(config);
        for (parameter, values) in layout.parameters.iter().zip(parameters) {
            npz.add(&parameter.name, &parameter.shape, values)?;
        }
        w.write_all(&npz.finish()?)
    })
}
