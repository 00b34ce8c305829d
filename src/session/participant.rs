//! Who stands in a line, for people to look at.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::Core;
use super::line::Member;
use crate::name::{self, Hidden};

/// One key in a line: who holds a lock, waits for it, or runs for an election.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Participant {
    /// The key.
    pub key: Vec<u8>,
    /// The revision at which the key was created: its order in line.
    pub create_revision: i64,
    /// The lease the key lives on. 0: none, so the key blocks its line until somebody deletes it.
    pub lease: i64,
    /// The value of the key: what a candidate of an election brings.
    pub value: Vec<u8>,
    /// Who it is, if the key says so in our way; see [`SessionBuilder::identity`](crate::SessionBuilder::identity).
    pub identity: Option<String>,
    /// Since when it stands there, by the clock of its own machine.
    pub since: Option<SystemTime>,
}

/// The value of a lock's key. Other programs ignore it.
#[derive(Serialize, Deserialize)]
struct Description<S> {
    identity: S,
    /// Seconds since 1970.
    since: u64,
}

/// The value of a lock key created now.
pub(crate) fn describe(core: &Core) -> Vec<u8> {
    let (identity, since) = (core.options.identity.as_str(), core.runtime.wall_seconds());
    serde_json::to_vec(&Description { identity, since }).unwrap_or_default()
}

impl From<Member> for Participant {
    fn from(member: Member) -> Self {
        // Anything can be in a foreign key's value; what is not ours says nothing.
        let description: Option<Description<String>> = serde_json::from_slice(&member.value).ok();
        let since = description.as_ref().and_then(|d| UNIX_EPOCH.checked_add(Duration::from_secs(d.since)));
        Self {
            key: member.facts.key,
            create_revision: member.facts.create_revision,
            lease: member.facts.lease,
            value: member.value,
            identity: description.map(|description| description.identity),
            since,
        }
    }
}

impl std::fmt::Debug for Participant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Participant")
            .field("key", &name::display(&self.key))
            .field("create_revision", &self.create_revision)
            .field("lease", &format_args!("{:x}", self.lease))
            .field("value", &Hidden(&self.value))
            .field("identity", &self.identity)
            .field("since", &self.since)
            .finish()
    }
}
