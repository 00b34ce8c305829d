//! Names, keys and ranges: the only place that builds keys.
//!
//! A name is used as it is given, byte for byte, followed by `/`: this is the layout of etcd's own Go packages, so that
//! `etcdctl lock NAME` and `Mutex::new(&session, NAME)` stand in one line.

use std::fmt::Write as _;

use etcd_client::proto::{PbCompare, PbTargetUnion, PbTxnOpRequest, PbTxnRequest, PbTxnRequestOp};

use crate::error::{Error, Result};

/// The longest name, in bytes.
pub const MAX_NAME: usize = 1024;

/// etcd's default limit of one request, in bytes; a server may be configured to take less or more.
const MAX_REQUEST: usize = 1536 * 1024;

/// Room kept in a request for keys, compares and framing, in bytes.
const REQUEST_OVERHEAD: usize = 8 * 1024;

/// etcd's default limit of operations in one list of a transaction.
const MAX_TXN_OPS: usize = 128;

/// A range of keys: everything that starts with some bytes, which for a name are `{name}/`. Never empty, so never the
/// whole keyspace.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Prefix(Vec<u8>);

impl Prefix {
    /// The keys of the line called `name`.
    pub(crate) fn of_name(name: &[u8]) -> Result<Self> {
        let refuse = |reason| Err(Error::InvalidName { name: display(name), reason });
        if name.is_empty() {
            return refuse("it is empty");
        }
        if name.len() > MAX_NAME {
            return refuse("it is longer than 1,024 bytes");
        }
        if name.contains(&0) {
            return refuse("it contains a NUL byte");
        }
        Ok(Self([name, b"/"].concat()))
    }

    /// The keys that start with `bytes`, which need not end in `/`: layouts of other programs.
    pub(crate) fn of_bytes(bytes: &[u8]) -> Result<Self> {
        if bytes.iter().all(|byte| *byte == u8::MAX) {
            let reason = "it is empty, or it has no end";
            return Err(Error::InvalidName { name: display(bytes), reason });
        }
        Ok(Self(bytes.to_vec()))
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The end of the range, exclusive.
    pub(crate) fn end(&self) -> Vec<u8> {
        end_of(&self.0)
    }

    /// The key of one place in this line: `{name}/{lease}-{nonce}`, both in lower-case hexadecimal digits.
    pub(crate) fn place(&self, lease: i64, nonce: u32) -> Vec<u8> {
        let mut key = Vec::with_capacity(self.0.len() + 25);
        key.extend_from_slice(&self.0);
        push_hex(&mut key, lease.cast_unsigned());
        key.push(b'-');
        push_hex(&mut key, nonce.into());
        key
    }

    /// Whether the range overlaps with the keys under `namespace`.
    pub(crate) fn overlaps(&self, namespace: &str) -> bool {
        self.0.starts_with(namespace.as_bytes()) || namespace.as_bytes().starts_with(&self.0)
    }

    /// Whether the range of one contains that of the other (and they are not the same).
    pub(crate) fn nested(&self, other: &Self) -> bool {
        self != other && (self.0.starts_with(&other.0) || other.0.starts_with(&self.0))
    }
}

impl std::fmt::Debug for Prefix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&display(&self.0))
    }
}

/// The end of the range of keys that start so, exclusive.
pub(crate) fn end_of(start: &[u8]) -> Vec<u8> {
    let mut end = start.to_vec();
    while end.last() == Some(&u8::MAX) {
        end.pop();
    }
    // The next prefix: of `a/` it is `a0`.
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

/// A value for `Debug`: its length, and nothing of what it says.
pub(crate) struct Hidden<'a>(pub(crate) &'a [u8]);

impl std::fmt::Debug for Hidden<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "<{} bytes>", self.0.len())
    }
}

/// The key of an op slot of a session.
pub(crate) fn slot(namespace: &str, lease: i64, index: u32) -> Vec<u8> {
    let mut key = Vec::with_capacity(namespace.len() + 28);
    key.extend_from_slice(namespace.as_bytes());
    push_hex(&mut key, lease.cast_unsigned());
    key.extend_from_slice(b"/op/");
    push_hex(&mut key, index.into());
    key
}

/// Adds a number in lower-case hexadecimal digits. Every lock makes such keys, and `format!` takes five times as long.
fn push_hex(key: &mut Vec<u8>, number: u64) {
    let digits = (u64::BITS - number.leading_zeros()).div_ceil(4).max(1);
    for digit in (0..digits).rev() {
        key.push(b"0123456789abcdef"[(number >> (4 * digit)) as usize % 16]);
    }
}

/// The key a session reads to prove that it talks to the current leader; it need not exist.
pub(crate) fn probe(namespace: &str) -> Vec<u8> {
    format!("{namespace}probe").into_bytes()
}

/// Refuses a value that cannot fit into one request.
pub(crate) fn check_value(value: &[u8]) -> Result<()> {
    let limit = MAX_REQUEST - REQUEST_OVERHEAD;
    if value.len() > limit {
        return Err(Error::TooLarge { what: "the value, in bytes,", size: value.len(), limit });
    }
    Ok(())
}

/// Refuses an item of a queue that could not be moved among the dead letters, which takes some room more.
pub(crate) fn check_item(value: &[u8]) -> Result<()> {
    let limit = MAX_REQUEST - 3 * REQUEST_OVERHEAD;
    if value.len() > limit {
        return Err(Error::TooLarge { what: "the item, in bytes,", size: value.len(), limit });
    }
    Ok(())
}

/// Refuses a transaction of the user's that etcd would refuse for its size; tells how many bytes it has. `outer` operations
/// are around it.
pub(crate) fn check_txn(txn: &PbTxnRequest, outer: usize) -> Result<usize> {
    let limit = MAX_TXN_OPS - outer;
    let operations = deepest(txn);
    if operations > limit {
        return Err(Error::TooLarge { what: "the number of operations", size: operations, limit });
    }
    let (size, limit) = (txn_bytes(txn), MAX_REQUEST - REQUEST_OVERHEAD);
    if size > limit {
        return Err(Error::TooLarge { what: "the transaction, in bytes,", size, limit });
    }
    Ok(size)
}

/// What etcd counts against its limit: the longest list, plus that of a transaction within it.
fn deepest(txn: &PbTxnRequest) -> usize {
    let own = txn.compare.len().max(txn.success.len()).max(txn.failure.len());
    let inner = txn.success.iter().chain(&txn.failure).filter_map(|op| match &op.request {
        Some(PbTxnOpRequest::RequestTxn(txn)) => Some(deepest(txn)),
        _ => None,
    });
    own + inner.max().unwrap_or(0)
}

/// The bytes of keys and values.
fn txn_bytes(txn: &PbTxnRequest) -> usize {
    let operation = |op: &PbTxnRequestOp| match &op.request {
        Some(PbTxnOpRequest::RequestPut(put)) => put.key.len() + put.value.len(),
        Some(PbTxnOpRequest::RequestRange(range)) => range.key.len() + range.range_end.len(),
        Some(PbTxnOpRequest::RequestDeleteRange(delete)) => delete.key.len() + delete.range_end.len(),
        Some(PbTxnOpRequest::RequestTxn(txn)) => txn_bytes(txn),
        None => 0,
    };
    let compare = |compare: &PbCompare| {
        let value = match &compare.target_union {
            Some(PbTargetUnion::Value(value)) => value.len(),
            _ => 0,
        };
        compare.key.len() + compare.range_end.len() + value
    };
    let compares: usize = txn.compare.iter().map(compare).sum();
    txn.success.iter().chain(&txn.failure).map(operation).sum::<usize>() + compares
}

/// A key or name for people: printable, escaped, at most some 80 characters.
pub(crate) fn display(key: &[u8]) -> String {
    const SHOWN: usize = 80;
    let mut text = String::new();
    for chunk in key[..key.len().min(SHOWN)].utf8_chunks() {
        text.extend(chunk.valid().chars().flat_map(|c| {
            let escape = c.is_control();
            escape.then(|| c.escape_default()).into_iter().flatten().chain((!escape).then_some(c))
        }));
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    if key.len() > SHOWN {
        text.push('…');
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_kept_byte_for_byte() {
        let prefix = Prefix::of_name(b"/a//b\xff").unwrap();
        assert_eq!(prefix.as_bytes(), b"/a//b\xff/");
        assert_eq!(prefix.end(), b"/a//b\xff0");
        assert_eq!(prefix.place(0xAB, 1), b"/a//b\xff/ab-1");
        assert_eq!(prefix.place(i64::MAX, 0), b"/a//b\xff/7fffffffffffffff-0");
        assert_eq!(slot("_ns/", 0x10, u32::MAX), b"_ns/10/op/ffffffff");
    }

    #[test]
    fn unusable_names_are_refused() {
        for name in [&b""[..], b"a\0b", &[b'x'; MAX_NAME + 1]] {
            assert!(matches!(Prefix::of_name(name), Err(Error::InvalidName { .. })));
        }
        assert!(Prefix::of_name(&[b'x'; MAX_NAME]).is_ok());
    }

    #[test]
    fn a_prefix_need_not_be_a_name() {
        let end = |bytes| Prefix::of_bytes(bytes).unwrap().end();
        assert_eq!((end(b"/services/a"), end(b"a\xff\xff")), (b"/services/b".to_vec(), b"b".to_vec()));
        for bytes in [&b""[..], b"\xff\xff"] {
            assert!(matches!(Prefix::of_bytes(bytes), Err(Error::InvalidName { .. })));
        }
    }

    #[test]
    fn only_a_name_below_another_is_nested() {
        let of = |name: &str| Prefix::of_name(name.as_bytes()).unwrap();
        assert!(of("a").nested(&of("a/b")) && of("a/").nested(&of("a")));
        assert!(!of("/lock").nested(&of("/lock2")) && !of("a").nested(&of("a")));
    }

    #[test]
    fn keys_are_shown_escaped_and_short() {
        assert_eq!(display(b"a\n\xff/b"), "a\\n\\xff/b");
        assert!(display(&[b'x'; 500]).chars().count() < 90);
    }
}
