//! Coordination for services on an [etcd](https://etcd.io) v3 cluster: one shared session, and on it a fair mutex with
//! fencing and leader election.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod error;
mod name;

pub mod election;
pub mod mutex;
pub mod session;

pub use etcd_client;

pub use crate::election::{DetachedLeadership, Election, Leader, Leadership, Observation, Observe};
pub use crate::error::{Error, Result};
pub use crate::mutex::{Mutex, MutexGuard};
pub use crate::name::MAX_NAME;
pub use crate::session::participant::Participant;
pub use crate::session::{Session, SessionBuilder, SessionState};
