//! What can go wrong, said so that the reader knows what to do next.

use std::time::Duration;

/// The result of an operation of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation did not do what it was asked.
///
/// Expected outcomes are not errors: a lock that is taken or an election without a leader is `Ok(None)`.
/// Faults that pass by themselves (a member that restarts, a leader change, an expired token) are retried inside;
/// what reaches the caller needs a decision.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The name cannot be used as a key; nothing was sent. Choose another.
    #[error("the name \"{name}\" cannot be used: {reason}")]
    InvalidName {
        /// The name as given, escaped and shortened.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },

    /// An option of a session or of a recipe is out of its range; nothing was sent. Change it.
    #[error("the option `{option}` cannot be used: {reason}")]
    InvalidOption {
        /// The builder's method that sets it.
        option: &'static str,
        /// What is wrong with it.
        reason: String,
    },

    /// A request is over a limit of etcd, or of a queue with a bound; it was not sent. Make it smaller.
    #[error("{what} is {size}, over the limit of {limit}")]
    TooLarge {
        /// What is too large, and in which unit.
        what: &'static str,
        /// Its size.
        size: usize,
        /// The limit.
        limit: usize,
    },

    /// No endpoint answered in time. Nothing of the operation remains at
    /// etcd, at most a lease without keys, which expires. Check the endpoints and try again.
    #[error("no etcd endpoint answered within {waited:?}; tried {}", endpoints.join(", "))]
    Unreachable {
        /// The endpoints that were tried.
        endpoints: Vec<String>,
        /// How long.
        waited: Duration,
        /// The last failure, when there was an answer at all.
        source: Option<etcd_client::Error>,
    },

    /// etcd refused the user name or the password. Check the credentials.
    #[error("etcd refused the user name or password")]
    AuthFailed {
        /// etcd's answer.
        source: etcd_client::Error,
    },

    /// The user has no permission for the key. Grant its role `readwrite` on the names it uses and on the session's
    /// namespace.
    #[error("etcd denied permission for the key {key}")]
    PermissionDenied {
        /// The key, escaped and shortened.
        key: String,
        /// etcd's answer.
        source: etcd_client::Error,
    },

    /// The hold on the key has ended: its lease expired or was revoked, or somebody deleted the key. Stop the guarded
    /// work; acquire again if it is still wanted.
    #[error("the hold on {key} is lost")]
    Lost {
        /// The key, escaped and shortened.
        key: String,
    },

    /// Somebody else has registered the same instance since. This registration is over; the other one stands.
    #[error("the registration {key} was superseded by a newer one of the same instance")]
    Superseded {
        /// The key, escaped and shortened.
        key: String,
    },

    /// The format has no place for this instance, or this service name; nothing was sent. Change one of them.
    #[error("{what} cannot be written in this format: {reason}")]
    InvalidInstance {
        /// The service and the id, escaped and shortened.
        what: String,
        /// What is wrong with it.
        reason: String,
    },

    /// The write was sent and cannot be resolved: it may or may not have been applied. Read before writing again.
    #[error("it is unknown whether the write guarded by {key} was applied")]
    OutcomeUnknown {
        /// The key that guards the write, escaped and shortened.
        key: String,
    },

    /// etcd is out of space and takes no new keys; releases still work. Compact, defragment and disarm the alarm.
    #[error("etcd is out of space and refused to create {key}")]
    NoSpace {
        /// The key, escaped and shortened.
        key: String,
    },

    /// A payload cannot be encoded. Nothing was sent.
    #[error("a payload for {key} cannot be encoded")]
    Malformed {
        /// Where it was to be put, escaped and shortened.
        key: String,
        /// What the encoder says.
        source: serde_json::Error,
    },

    /// The value does not decode as the type it is read as. Correct the value, or the type.
    #[error("the value of {key} cannot be decoded: {reason}")]
    Undecodable {
        /// The key, escaped and shortened.
        key: String,
        /// What is wrong, without anything of the value.
        reason: String,
    },

    /// The session was closed. Connect another.
    #[error("the session is closed")]
    Closed,

    /// etcd refused the request for another reason.
    #[error("etcd refused the request for {key}")]
    Etcd {
        /// The key, escaped and shortened.
        key: String,
        /// etcd's answer.
        source: etcd_client::Error,
    },
}

impl Error {
    /// Tells whether a hold has ended ([`Error::Lost`]): the guarded work must stop, a new acquisition may succeed.
    pub fn is_lost(&self) -> bool {
        matches!(self, Error::Lost { .. })
    }

    /// Whether etcd may accept later what it refused with this.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(self, Error::NoSpace { .. } | Error::PermissionDenied { .. } | Error::AuthFailed { .. })
    }
}
