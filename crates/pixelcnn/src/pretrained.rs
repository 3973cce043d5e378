//! The trained models that come with the library: feature `pretrained`, on by default.

use std::fmt;
use std::path::Path;

use crate::model::Model;
use crate::score::Reference;
use crate::weights::hub;
use crate::weights::safetensors::FileError;

/// A trained model that is part of the library. Its card says how it was trained and how good it is.
///
/// Later versions may add some; those that are here stay, so that whatever was compressed with them can be
/// read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Shipped {
    /// Of 32x32 images in RGB, trained on CIFAR-10's 50,000 training images.
    Cifar10,
}

/// The library has no model of a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{PREFIX}{name}: there is no such model: choose {all}", name = .0, all = all())]
pub struct NoSuchModel(String);

/// What stands before its name where files could be named, too.
const PREFIX: &str = "shipped:";

fn all() -> String {
    let all = Shipped::ALL.iter();
    all.map(Shipped::to_string).collect::<Vec<_>>().join(" or ")
}

impl fmt::Display for Shipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.name())
    }
}

impl Shipped {
    /// All of them.
    pub const ALL: &[Shipped] = &[Shipped::Cifar10];

    /// A name for it.
    pub fn name(self) -> &'static str {
        match self {
            Shipped::Cifar10 => "cifar10",
        }
    }

    /// The one that a path stands for, such as `shipped:cifar10`; none where it is a file's.
    ///
    /// # Errors
    /// [`NoSuchModel`].
    pub fn of_path(path: &Path) -> Result<Option<Shipped>, NoSuchModel> {
        let Some(name) = path.to_str().and_then(|path| path.strip_prefix(PREFIX)) else {
            return Ok(None);
        };
        let mut all = Shipped::ALL.iter().copied();
        let found = all.find(|shipped| shipped.name() == name);
        found.map(Some).ok_or_else(|| NoSuchModel(name.into()))
    }

    /// The model itself.
    ///
    /// # Errors
    /// Where the file that the library was built with was damaged.
    pub fn model(self) -> Result<Model, FileError> {
        let file: &[u8] = match self {
            Shipped::Cifar10 => include_bytes!("../pretrained/cifar10.safetensors"),
        };
        hub::parse(file, &format!("{}.safetensors", self.name()))
    }

    /// How the test images of its data score under it.
    ///
    /// # Errors
    /// Where the file that the library was built with was damaged.
    pub fn reference(self) -> Result<Reference, serde_json::Error> {
        serde_json::from_str(match self {
            Shipped::Cifar10 => include_str!("../pretrained/cifar10-reference.json"),
        })
    }
}

impl Model {
    /// The model of CIFAR-10 that comes with the library: [`Shipped::Cifar10`].
    ///
    /// # Errors
    /// Where the file that the library was built with was damaged.
    pub fn pretrained() -> Result<Model, FileError> {
        Shipped::Cifar10.model()
    }
}
