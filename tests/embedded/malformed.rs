//! Requests that no good client sends, written to the wire as they are: refused with etcd's codes and in its words.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::time::Duration;

use etcd_client::proto::{
    PbCompactionRequest, PbCompactionResponse, PbCompare, PbDeleteRequest, PbDeleteResponse,
    PbLeaseGrantRequest, PbLeaseGrantResponse, PbLeaseKeepAliveRequest, PbLeaseKeepAliveResponse,
    PbLeaseRevokeRequest, PbLeaseRevokeResponse, PbLeaseTimeToLiveRequest, PbLeaseTimeToLiveResponse,
    PbPutRequest, PbPutResponse, PbRangeRequest, PbRangeResponse, PbResponseHeader, PbTargetUnion,
    PbTxnOpRequest, PbTxnRequest, PbTxnRequestOp, PbTxnResponse, PbWatchResponse,
};
use etcd_recipes::embedded;
use futures::stream::{self, StreamExt as _};
use http::uri::PathAndQuery;
use prost::Message;
use tonic::client::Grpc;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};
use tonic_prost::ProstCodec;

use crate::support::server::Server;

/// A connection that adds nothing and checks nothing.
struct Raw(Grpc<Channel>);

impl Raw {
    async fn connect(url: String) -> Self {
        let channel = Endpoint::from_shared(url).unwrap().connect().await.unwrap();
        Self(Grpc::new(channel).max_encoding_message_size(64 << 20))
    }

    /// One request and its answer.
    async fn call<Q, R>(&mut self, path: &'static str, request: Q) -> Result<R, Status>
    where
        Q: Message + Default + 'static,
        R: Message + Default + 'static,
    {
        self.0.ready().await.unwrap();
        let path = PathAndQuery::from_static(path);
        let answer = self.0.unary(Request::new(request), path, ProstCodec::<Q, R>::default());
        let answer = tokio::time::timeout(Duration::from_secs(30), answer).await.expect("no answer");
        answer.map(tonic::Response::into_inner)
    }

    /// A watch stream with these requests. What it says of them, and what each watch was told, until nothing comes any
    /// more.
    async fn watch(&mut self, requests: Vec<WatchRequest>) -> (Vec<String>, BTreeMap<i64, Vec<String>>) {
        self.0.ready().await.unwrap();
        let requests = stream::iter(requests).chain(stream::pending());
        let path = PathAndQuery::from_static("/etcdserverpb.Watch/Watch");
        let answers = self.0.streaming(Request::new(requests), path, ProstCodec::default()).await;
        let mut answers: Streaming<PbWatchResponse> = answers.unwrap().into_inner();
        let (mut said, mut told) = (Vec::new(), BTreeMap::<i64, Vec<String>>::new());
        while let Ok(answer) = tokio::time::timeout(Duration::from_secs(2), answers.message()).await {
            let answer = answer.unwrap().expect("the stream has ended");
            let events = told.entry(answer.watch_id).or_default();
            let PbWatchResponse { watch_id, created, canceled, cancel_reason, .. } = &answer;
            if *created {
                said.push(format!("{watch_id} {canceled} {cancel_reason}"));
            } else if *canceled {
                events.push(format!("{} {cancel_reason}", answer.compact_revision));
            }
            events.extend(answer.events.iter().map(|event| format!("{event:?}")));
        }
        (said, told)
    }
}

/// A request of a watch stream, as far as it is wrong here.
#[derive(Clone, PartialEq, Message)]
struct WatchRequest {
    #[prost(message, optional, tag = "1")]
    create: Option<Create>,
    #[prost(message, optional, tag = "2")]
    cancel: Option<Cancel>,
}

#[derive(Clone, PartialEq, Message)]
struct Create {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    range_end: Vec<u8>,
    #[prost(int64, tag = "3")]
    start_revision: i64,
    #[prost(int32, repeated, tag = "5")]
    filters: Vec<i32>,
    #[prost(int64, tag = "7")]
    watch_id: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Cancel {
    #[prost(int64, tag = "1")]
    watch_id: i64,
}

/// The code and the words of a refusal, or what else was said.
fn said<R: Message>(answer: Result<R, Status>, show: impl FnOnce(R) -> String) -> String {
    match answer {
        Ok(answer) => show(answer),
        Err(status) => format!("{:?}: {}", status.code(), status.message()),
    }
}

/// A real etcd and an embedded one that have seen the same.
struct Both {
    raw: [Raw; 2],
    _etcd: Server,
    _embedded: embedded::Server,
}

impl Both {
    async fn start() -> Self {
        let etcd = Server::fast().await;
        let embedded = embedded::Server::listen("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", embedded.address().unwrap());
        let raw = [Raw::connect(etcd.endpoint()).await, Raw::connect(url).await];
        Self { raw, _etcd: etcd, _embedded: embedded }
    }

    /// The same request to both: both say the same.
    async fn same<Q, R>(
        &mut self,
        path: &'static str,
        request: &Q,
        show: impl Fn(R) -> String + Copy,
    ) -> String
    where
        Q: Message + Default + Clone + Debug + 'static,
        R: Message + Default + 'static,
    {
        let [etcd, embedded] = &mut self.raw;
        let theirs = said(etcd.call(path, request.clone()).await, show);
        let ours = said(embedded.call(path, request.clone()).await, show);
        let asked: String = format!("{request:?}").chars().take(300).collect();
        assert_eq!(ours, theirs, "{path} {asked}");
        ours
    }

    async fn range(&mut self, request: PbRangeRequest) -> String {
        let show = |mut got: PbRangeResponse| {
            bare(&mut got.header);
            format!("{got:?}")
        };
        self.same("/etcdserverpb.KV/Range", &request, show).await
    }

    async fn put(&mut self, request: PbPutRequest) -> String {
        let show = |mut done: PbPutResponse| {
            bare(&mut done.header);
            format!("{done:?}")
        };
        self.same("/etcdserverpb.KV/Put", &request, show).await
    }

    async fn txn(&mut self, request: PbTxnRequest) -> String {
        let show = |mut done: PbTxnResponse| {
            bare(&mut done.header);
            format!("{done:?}")
        };
        self.same("/etcdserverpb.KV/Txn", &request, show).await
    }
}

/// Leaves the revision: ids and terms are each server's own.
fn bare(header: &mut Option<PbResponseHeader>) {
    if let Some(header) = header {
        *header = PbResponseHeader { revision: header.revision, ..PbResponseHeader::default() };
    }
}

fn key() -> Vec<u8> {
    b"k".to_vec()
}

fn op(request: PbTxnOpRequest) -> PbTxnRequestOp {
    PbTxnRequestOp { request: Some(request) }
}

fn then(success: Vec<PbTxnRequestOp>) -> PbTxnRequest {
    PbTxnRequest { success, ..PbTxnRequest::default() }
}

fn put_op(key: &[u8]) -> PbTxnRequestOp {
    op(PbTxnOpRequest::RequestPut(PbPutRequest { key: key.to_vec(), ..PbPutRequest::default() }))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_and_writes_are_refused_as_by_etcd() {
    let mut both = Both::start().await;
    let range = || PbRangeRequest { key: key(), ..PbRangeRequest::default() };
    both.put(PbPutRequest { key: key(), value: b"v".to_vec(), ..PbPutRequest::default() }).await;
    assert_eq!(
        both.range(PbRangeRequest::default()).await,
        "InvalidArgument: etcdserver: key is not provided"
    );
    both.range(PbRangeRequest { range_end: b"a".to_vec(), ..range() }).await;
    for number in [i64::MIN, -1, i64::MAX] {
        both.range(PbRangeRequest { revision: number, ..range() }).await;
        both.range(PbRangeRequest { limit: number, ..range() }).await;
        let bounds = PbRangeRequest { min_mod_revision: number, max_create_revision: number, ..range() };
        both.range(bounds).await;
    }

    let put = || PbPutRequest { key: key(), ..PbPutRequest::default() };
    both.put(PbPutRequest::default()).await;
    both.put(PbPutRequest { ignore_value: true, value: b"v".to_vec(), ..put() }).await;
    both.put(PbPutRequest { ignore_lease: true, lease: 1, ..put() }).await;
    both.put(PbPutRequest { ignore_lease: true, key: b"none".to_vec(), ..put() }).await;
    for lease in [i64::MIN, -1, 5] {
        both.put(PbPutRequest { lease, ..put() }).await;
    }
    let done = |mut done: PbDeleteResponse| {
        bare(&mut done.header);
        format!("{done:?}")
    };
    for delete in [
        PbDeleteRequest::default(),
        PbDeleteRequest { key: b"z".to_vec(), range_end: b"a".to_vec(), ..PbDeleteRequest::default() },
        PbDeleteRequest { range_end: b"\0".to_vec(), ..PbDeleteRequest::default() },
    ] {
        both.same("/etcdserverpb.KV/DeleteRange", &delete, done).await;
    }
    let done = |_: PbCompactionResponse| String::new();
    for revision in [0, -1, i64::MIN, 100, i64::MAX] {
        let request = PbCompactionRequest { revision, physical: true };
        both.same("/etcdserverpb.KV/Compact", &request, done).await;
    }
    // Both are still there, and nothing was written.
    both.range(range()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_that_are_none_sort_nothing_as_at_etcd() {
    let mut both = Both::start().await;
    // The order of the keys, of the values and of the revisions differ.
    for (key, value) in [("b", "2"), ("c", "1"), ("a", "3"), ("b", "4")] {
        let put = PbPutRequest { key: key.into(), value: value.into(), ..PbPutRequest::default() };
        both.put(put).await;
    }
    for sort_order in [-1, 0, 1, 2, 3, i32::MAX] {
        for sort_target in [0, 1, 2, 3, 4, -1, 9] {
            let range = PbRangeRequest { key: vec![0], range_end: vec![0], ..PbRangeRequest::default() };
            let all = PbRangeRequest { sort_order, sort_target, ..range };
            let limited = PbRangeRequest { limit: 2, ..all.clone() };
            let sorts = (0..=2).contains(&sort_order);
            match (sorts, sort_target) {
                // Of those that are alike etcd's order is any.
                (true, 1) => {}
                (true, -1 | 9) => {
                    // The etcds of the tests end themselves over this.
                    let path = "/etcdserverpb.KV/Range";
                    let answer: Result<PbRangeResponse, _> = both.raw[1].call(path, all).await;
                    let refusal = answer.unwrap_err();
                    let words = "etcdserver: invalid sort option";
                    assert_eq!((refusal.code(), refusal.message()), (Code::InvalidArgument, words));
                }
                _ => {
                    both.range(limited.clone()).await;
                    both.range(all).await;
                    both.txn(then(vec![op(PbTxnOpRequest::RequestRange(limited))])).await;
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transactions_are_refused_as_by_etcd() {
    let mut both = Both::start().await;
    both.put(PbPutRequest { key: key(), value: b"v".to_vec(), ..PbPutRequest::default() }).await;
    both.txn(PbTxnRequest::default()).await;
    both.txn(then(vec![PbTxnRequestOp::default()])).await;
    both.txn(then(vec![op(PbTxnOpRequest::RequestTxn(then(vec![PbTxnRequestOp::default()])))])).await;
    both.txn(then(vec![put_op(b"")])).await;
    both.txn(then(vec![op(PbTxnOpRequest::RequestRange(PbRangeRequest::default()))])).await;
    both.txn(then(vec![op(PbTxnOpRequest::RequestDeleteRange(PbDeleteRequest::default()))])).await;
    both.txn(then(vec![put_op(b"a"), put_op(b"a")])).await;
    both.txn(then((0..129).map(|n| put_op(format!("{n}").as_bytes())).collect())).await;
    let inner = then((0..128).map(|n| put_op(format!("{n}").as_bytes())).collect());
    both.txn(then(vec![op(PbTxnOpRequest::RequestTxn(inner))])).await;
    let future = PbRangeRequest { key: key(), revision: 99, ..PbRangeRequest::default() };
    both.txn(then(vec![put_op(b"not written"), op(PbTxnOpRequest::RequestRange(future))])).await;

    let compare = || PbCompare { key: key(), ..PbCompare::default() };
    for compare in [
        PbCompare::default(),
        PbCompare { target: 9, ..compare() },
        PbCompare { result: 9, ..compare() },
        PbCompare { target: -1, result: -1, ..compare() },
        // A target that does not fit what it is compared with.
        PbCompare { target: 3, target_union: Some(PbTargetUnion::Version(1)), ..compare() },
        PbCompare { target: 0, target_union: Some(PbTargetUnion::Value(b"v".to_vec())), ..compare() },
        PbCompare { target: 1, ..compare() },
        PbCompare { range_end: b"a".to_vec(), result: 1, ..compare() },
    ] {
        let request = PbTxnRequest {
            compare: vec![compare],
            failure: vec![put_op(b"otherwise")],
            ..PbTxnRequest::default()
        };
        both.txn(request).await;
    }
    both.range(PbRangeRequest {
        key: b"\0".to_vec(),
        range_end: b"\0".to_vec(),
        ..PbRangeRequest::default()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_are_refused_as_by_etcd() {
    let mut both = Both::start().await;
    let granted = |done: PbLeaseGrantResponse| format!("{} {} {}", done.id != 0, done.ttl, done.error);
    for (id, ttl) in
        [(7, 100), (7, 100), (8, 0), (9, -1), (10, i64::MIN), (11, i64::MAX), (12, 9_000_000_001), (-5, 100)]
    {
        let request = PbLeaseGrantRequest { id, ttl };
        both.same("/etcdserverpb.Lease/LeaseGrant", &request, granted).await;
    }
    let revoked = |_: PbLeaseRevokeResponse| "revoked".to_owned();
    let facts = |found: PbLeaseTimeToLiveResponse| {
        format!("{} {} {} {:?}", found.id, found.ttl > 0, found.granted_ttl, found.keys)
    };
    for id in [0, 99, i64::MIN, -5, 7] {
        let request = PbLeaseTimeToLiveRequest { id, keys: true };
        both.same("/etcdserverpb.Lease/LeaseTimeToLive", &request, facts).await;
        both.same("/etcdserverpb.Lease/LeaseRevoke", &PbLeaseRevokeRequest { id }, revoked).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_too_large_is_refused_as_by_etcd() {
    let mut both = Both::start().await;
    for size in [1536 * 1024 + 1, 3 << 20] {
        both.put(PbPutRequest { key: key(), value: vec![b'v'; size], ..PbPutRequest::default() }).await;
        both.put(PbPutRequest { key: vec![b'k'; size], ..PbPutRequest::default() }).await;
    }
    let half = vec![b'v'; 800 << 10];
    let put = |key: &[u8]| {
        let put = PbPutRequest { key: key.to_vec(), value: half.clone(), ..PbPutRequest::default() };
        op(PbTxnOpRequest::RequestPut(put))
    };
    both.txn(then(vec![put(b"a"), put(b"b")])).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_are_no_request_are_refused() {
    let mut both = Both::start().await;
    for raw in &mut both.raw {
        // A number where a key is to be, and a compare that ends before it is over. The words are those of the library.
        let range: Result<PbRangeResponse, _> = raw.call("/etcdserverpb.KV/Range", 1_u64).await;
        assert_eq!(range.unwrap_err().code(), Code::Internal);
        let txn: Result<PbTxnResponse, _> = raw.call("/etcdserverpb.KV/Txn", vec![0x1a, 0x7f]).await;
        assert_eq!(txn.unwrap_err().code(), Code::Internal);
    }
    both.range(PbRangeRequest { key: key(), ..PbRangeRequest::default() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches_are_refused_as_by_etcd() {
    let mut both = Both::start().await;
    both.put(PbPutRequest { key: key(), value: b"v".to_vec(), ..PbPutRequest::default() }).await;
    let create = || Create { key: key(), start_revision: 1, ..Create::default() };
    let creates = [
        Create { range_end: b"a".to_vec(), ..create() },
        Create { key: Vec::new(), range_end: b"\0".to_vec(), ..create() },
        Create { start_revision: i64::MAX, ..create() },
        Create { watch_id: -7, ..create() },
        Create { watch_id: -7, ..create() },
        Create { filters: vec![9, -1], ..create() },
        Create { filters: vec![0, 0, 1], ..create() },
    ];
    // No answer comes to the first two.
    let mut requests =
        vec![WatchRequest::default(), WatchRequest { cancel: Some(Cancel { watch_id: 99 }), create: None }];
    requests.extend(creates.map(|create| WatchRequest { create: Some(create), cancel: None }));
    let mut told = Vec::new();
    for raw in &mut both.raw {
        let most = raw.watch(requests.clone()).await;
        // Apart from others: an etcd that is asked for such a watch tells none of its history.
        let create = Create { start_revision: i64::MIN, ..create() };
        told.push((most, raw.watch(vec![WatchRequest { create: Some(create), cancel: None }]).await));
    }
    assert_eq!(told[1], told[0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_from_before_the_first_revision_tells_what_etcd_does() {
    let mut both = Both::start().await;
    let put = |value: &str| PbPutRequest { key: key(), value: value.into(), ..PbPutRequest::default() };
    let create = || Create { key: key(), start_revision: -1, ..Create::default() };
    for compacted in [None, Some(0), Some(2)] {
        both.put(put("before")).await;
        if let Some(revision) = compacted {
            let request = PbCompactionRequest { revision, physical: true };
            both.same("/etcdserverpb.KV/Compact", &request, |_: PbCompactionResponse| String::new()).await;
        }
        let mut told = Vec::new();
        for raw in &mut both.raw {
            let mut writer = Raw(raw.0.clone());
            let late = async {
                // The first is told of the past by then, if it is at all.
                tokio::time::sleep(Duration::from_secs(1)).await;
                let put: Result<PbPutResponse, _> = writer.call("/etcdserverpb.KV/Put", put("after")).await;
                put.unwrap();
            };
            let create = WatchRequest { create: Some(create()), cancel: None };
            told.push(tokio::join!(raw.watch(vec![create]), late).0);
        }
        assert_eq!(told[1], told[0], "compacted: {compacted:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn methods_that_a_service_does_not_have_are_refused_as_by_etcd() {
    let mut both = Both::start().await;
    for path in [
        "/etcdserverpb.KV/Nothing",
        "/etcdserverpb.KV/RangeStream",
        "/etcdserverpb.Watch/Nothing",
        "/etcdserverpb.Lease/nothing%20at-all",
        "/etcdserverpb.Maintenance/status",
        "/etcdserverpb.Cluster/Nothing",
    ] {
        let said =
            both.same(path, &PbRangeRequest::default(), |got: PbRangeResponse| format!("{got:?}")).await;
        assert!(said.starts_with("Unimplemented: unknown method "), "{said}");
    }
    // As before.
    both.range(PbRangeRequest { key: key(), ..PbRangeRequest::default() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keepalives_of_no_lease_are_answered_as_by_etcd() {
    let mut both = Both::start().await;
    let mut answers = Vec::new();
    for raw in &mut both.raw {
        let requests = [0, -1, 99].map(|id| PbLeaseKeepAliveRequest { id });
        let path = PathAndQuery::from_static("/etcdserverpb.Lease/LeaseKeepAlive");
        raw.0.ready().await.unwrap();
        let request = Request::new(stream::iter(requests));
        let stream =
            raw.0.streaming(request, path, ProstCodec::<_, PbLeaseKeepAliveResponse>::default()).await;
        let mut stream = stream.unwrap().into_inner();
        let mut said = Vec::new();
        while let Some(answer) = stream.message().await.unwrap() {
            said.push((answer.id, answer.ttl));
        }
        answers.push(said);
    }
    assert_eq!(answers[1], answers[0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_that_are_not_there_are_named() {
    let server = embedded::Server::listen("127.0.0.1:0").await.unwrap();
    let mut raw = Raw::connect(format!("http://{}", server.address().unwrap())).await;
    for (path, name) in [
        ("/v3lockpb.Lock/Lock", "v3lockpb.Lock/Lock"),
        ("/v3electionpb.Election/Campaign", "v3electionpb.Election/Campaign"),
        ("/etcdserverpb.Auth/UserList", "Auth/UserList"),
        ("/etcdserverpb.Cluster/MemberAdd", "Cluster/MemberAdd"),
        ("/etcdserverpb.Maintenance/Snapshot", "Maintenance/Snapshot"),
        ("/etcdserverpb.Maintenance/MoveLeader", "Maintenance/MoveLeader"),
        ("/nobody.Knows/This", "nobody.Knows/This"),
    ] {
        let answer: Result<PbRangeResponse, _> = raw.call(path, PbRangeRequest::default()).await;
        let refusal = answer.unwrap_err();
        let words = format!("{name} is not served by the embedded server");
        assert_eq!((refusal.code(), refusal.message()), (Code::Unimplemented, words.as_str()));
    }
}
