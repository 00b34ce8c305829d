//! A line as etcd shows it, and a foreign program that stands in it.

use std::collections::VecDeque;
use std::time::Duration;

use etcd_client::{Client, GetOptions, PutOptions, SortOrder, SortTarget};

use super::check::{Scope, eventually};

/// One key of a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its key.
    pub(crate) key: String,
    /// Its value.
    pub(crate) value: String,
    /// When it came.
    pub(crate) created: i64,
    /// When it was written last.
    pub(crate) modified: i64,
    /// The lease it lives on.
    pub(crate) lease: i64,
}

/// The line of a name, the first in front.
pub(crate) async fn line(client: &mut Client, name: &str) -> Vec<Entry> {
    let options = GetOptions::new().with_prefix().with_sort(SortTarget::Create, SortOrder::Ascend);
    let answer = client.get(format!("{name}/"), Some(options)).await.expect("cannot read a line");
    let entry = |kv: &etcd_client::KeyValue| Entry {
        key: text(kv.key()),
        value: text(kv.value()),
        created: kv.create_revision(),
        modified: kv.mod_revision(),
        lease: kv.lease(),
    };
    answer.kvs().iter().map(entry).collect()
}

/// Bytes as text, for people and for comparing.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Waits until a line has this many keys, and returns them.
pub(crate) async fn grown_to(client: &Client, name: &str, count: usize) -> Vec<Entry> {
    let mut client = client.clone();
    let mut found = Vec::new();
    eventually(Duration::from_secs(20), &format!("{count} keys in the line {name}"), async || {
        found = line(&mut client, name).await;
        found.len() == count
    })
    .await;
    found
}

/// A program that knows nothing of this crate and stands in a line as etcd's Go package does.
pub(crate) struct Foreign {
    client: Client,
    lease: i64,
    /// Its keys, the first in front.
    keys: VecDeque<String>,
}

impl Foreign {
    /// Enters a line at its end.
    pub(crate) async fn enter(scope: &Scope, name: &str) -> Self {
        Self::crowd(scope, name, 1).await
    }

    /// Enters a line many times.
    pub(crate) async fn crowd(scope: &Scope, name: &str, count: usize) -> Self {
        let mut client = scope.client();
        let lease = client.lease_grant(600, None).await.expect("no lease").id();
        scope.owns_lease(lease);
        let keys: VecDeque<String> = (0..count).map(|number| format!("{name}/{lease:x}{number}")).collect();
        for key in &keys {
            let options = PutOptions::new().with_lease(lease);
            client.put(key.as_str(), "", Some(options)).await.expect("cannot enter");
        }
        Self { client, lease, keys }
    }

    /// The lease its keys live on.
    pub(crate) fn lease(&self) -> i64 {
        self.lease
    }

    /// Takes away its keys, one after the other, the first in front.
    pub(crate) async fn leave_one_by_one(&mut self) {
        while let Some(key) = self.keys.front() {
            self.client.delete(key.as_str(), None).await.expect("cannot leave");
            self.keys.pop_front();
        }
    }

    /// Leaves the line with all that is left of it.
    pub(crate) async fn leave(mut self) {
        self.client.lease_revoke(self.lease).await.expect("cannot leave");
    }
}
