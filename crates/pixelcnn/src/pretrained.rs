//! The trained model that comes with the library: feature `pretrained`, on by default.

use crate::model::Model;
use crate::score::Reference;
use crate::weights::hub;
use crate::weights::safetensors::FileError;

impl Model {
    /// The model that comes with the library: of 32x32 images in RGB, trained on CIFAR-10's 50,000
    /// training images. Its card says how it was trained and how good it is.
    ///
    /// # Errors
    /// Where the file that the library was built with was damaged.
    pub fn pretrained() -> Result<Model, FileError> {
        let file = include_bytes!("../pretrained/cifar10.safetensors");
        hub::parse(file, "cifar10.safetensors")
    }
}

impl Reference {
    /// How the test images of its data score under the [pretrained](Model::pretrained) model.
    ///
    /// # Errors
    /// Where the file that the library was built with was damaged.
    pub fn pretrained() -> Result<Reference, serde_json::Error> {
        serde_json::from_str(include_str!("../pretrained/cifar10-reference.json"))
    }
}
