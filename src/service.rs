//! Services: who runs where, and which of them takes the next call.
//!
//! An [`Instance`] is written to etcd in a [`Format`]; [`formats`] has those of other programs. A [`Balancer`] chooses
//! among instances.

mod balancer;
mod format;
pub mod formats;
mod instance;

pub use self::balancer::{Balancer, Pick, Policy};
pub use self::format::{Format, FormatError};
pub use self::instance::Instance;
