//! How each figure is measured.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use etcd_client::{Client, GetOptions, PutOptions};
use etcd_recipes::Session;
use etcd_recipes::service::formats::Json;
use etcd_recipes::service::{Instance, Registration, Services};
use futures::future::try_join_all;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::json;

use crate::common::compare::{Figure, Rounds, median, memory, run_program};
use crate::common::counters::{self, own_memory};
use crate::common::fresh;
use crate::common::line::{Line, Measured};
use crate::common::options::Options;

const PEER: &str = "etcd-recipes";
/// How many raw puts are under way at once.
const IN_FLIGHT: usize = 64;
/// Until what is in flight has settled.
const SETTLE: Duration = Duration::from_secs(2);
/// The TTL while keepalives are counted.
const TTL: Duration = Duration::from_secs(6);

/// Something that gives one or several figures.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Measure {
    Time,
    Back,
    Keepalives,
    Memory,
}

/// Measures the table of the service benchmark.
#[derive(Debug, Parser)]
#[command(name = "service")]
pub(crate) struct Bench {
    #[command(flatten)]
    pub(crate) options: Options,
    /// Measure the memory of this process, and print one line
    #[arg(long, hide = true)]
    pub(crate) memory: bool,
}

impl Bench {
    /// How many registrations.
    pub(crate) fn count(&self) -> usize {
        if self.options.quick { 1000 } else { 10_000 }
    }

    /// Gives the figures in the order of their rows.
    pub(crate) async fn measure(&self, measure: Measure) -> Result<Vec<Option<Figure>>> {
        match measure {
            Measure::Time => self.time().await,
            Measure::Back => self.back().await,
            Measure::Keepalives => self.keepalives().await,
            Measure::Memory => self.memory().await,
        }
    }

    async fn time(&self) -> Result<Vec<Option<Figure>>> {
        let count = if self.options.quick { 3 } else { 9 };
        let rounds = Rounds::run(count, async || self.register().await, async || self.put().await).await?;
        let seconds = |secs: f64| format!("{secs:.3} s");
        let each = median(&rounds.measured, |line| line.rpc_unary_per_op);
        let leases = median(&rounds.measured, |line| line.extra("leases"));
        let origin = || "etcd's metrics".to_owned();
        Ok(vec![
            Some(rounds.ratio(|line| line.secs, seconds)),
            Some(Figure { value: each, origin: origin() }),
            Some(Figure { value: leases, origin: origin() }),
        ])
    }

    /// All registrations at once, in a session of their own. The session is opened while it is counted, not timed.
    async fn register(&self) -> Result<Line> {
        let before = counters::read(self.options.metrics()).await?;
        let session = Session::connect([&self.options.endpoint]).await?;
        let (root, start) = (fresh("service"), Instant::now());
        let all = self.register_on(&session, &root).await?;
        let secs = start.elapsed().as_secs_f64();
        let counted = counters::difference(&before, &counters::read(self.options.metrics()).await?);
        ensure!(self.present(&root).await? == self.count(), "some are missing");
        session.close().await?;
        drop(all);
        Ok(self.line(secs, counted))
    }

    async fn register_on(&self, session: &Session, root: &str) -> Result<Vec<Registration>> {
        let services = Services::with_format(session, Json::under(format!("{root}/")));
        let one = |number: usize| services.register(instance(number));
        Ok(try_join_all((0..self.count()).map(one)).await?)
    }

    /// The same keys and values as single puts on one lease.
    async fn put(&self) -> Result<Line> {
        let client = Client::connect([&self.options.endpoint], None).await?;
        let lease = client.lease_client().grant(60, None).await?.id();
        let (root, before) = (fresh("service"), counters::read(self.options.metrics()).await?);
        let value =
            r#"{"address":"10.20.30.40:50051","version":"1.2.0","weight":10,"metadata":{"zone":"a"}}"#;
        let start = Instant::now();
        let put = |number: usize| {
            let (mut kv, key) = (client.kv_client(), format!("{root}/courseware/{number}"));
            async move { kv.put(key, value, Some(PutOptions::new().with_lease(lease))).await }
        };
        let puts = stream::iter((0..self.count()).map(put)).buffer_unordered(IN_FLIGHT);
        puts.try_for_each(async |_| Ok(())).await?;
        let secs = start.elapsed().as_secs_f64();
        let counted = counters::difference(&before, &counters::read(self.options.metrics()).await?);
        client.lease_client().revoke(lease).await?;
        Ok(self.line(secs, counted))
    }

    /// The lease is revoked: until all are there again.
    async fn back(&self) -> Result<Vec<Option<Figure>>> {
        let session = Session::connect([&self.options.endpoint]).await?;
        let (root, start) = (fresh("service"), Instant::now());
        let all = self.register_on(&session, &root).await?;
        let registered = start.elapsed();
        tokio::time::sleep(SETTLE).await;
        let client = Client::connect([&self.options.endpoint], None).await?;
        client.lease_client().revoke(session.lease_id().context("no lease")?).await?;
        let start = Instant::now();
        while self.present(&root).await? < self.count() {
            ensure!(start.elapsed() < Duration::from_secs(60), "they do not come back");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let back = start.elapsed();
        session.close().await?;
        drop(all);
        let value = back.as_secs_f64() - registered.as_secs_f64();
        let origin = format!("{:.3} s, registered in {:.3} s", back.as_secs_f64(), registered.as_secs_f64());
        Ok(vec![Some(Figure { value, origin })])
    }

    async fn keepalives(&self) -> Result<Vec<Option<Figure>>> {
        let session = Session::builder([&self.options.endpoint]).ttl(TTL).connect().await?;
        let all = self.register_on(&session, &fresh("service")).await?;
        tokio::time::sleep(SETTLE).await;
        let thirds = if self.options.quick { 2_u32 } else { 6 };
        let before = counters::read(self.options.metrics()).await?;
        tokio::time::sleep(TTL / 3 * thirds).await;
        let counted = counters::difference(&before, &counters::read(self.options.metrics()).await?);
        session.close().await?;
        drop(all);
        let beats = counted.get("in/LeaseKeepAlive").copied().unwrap_or_default();
        let value = beats / f64::from(thirds);
        Ok(vec![Some(Figure { value, origin: format!("{beats} in {thirds} thirds") })])
    }

    async fn memory(&self) -> Result<Vec<Option<Figure>>> {
        let mut args = vec!["--memory".to_owned(), format!("--endpoints={}", self.options.endpoint)];
        args.extend([format!("--metrics={}", self.options.metrics())]);
        args.extend(self.options.quick.then(|| "--quick".to_owned()));
        let line = run_program(&std::env::current_exe()?, &args).await?;
        Ok(vec![Some(memory(&line))])
    }

    /// What this process needs for its registrations. Nothing else may have used any before.
    pub(crate) async fn own_memory(&self) -> Result<Line> {
        let session = Session::connect([&self.options.endpoint]).await?;
        tokio::time::sleep(SETTLE).await;
        let (before, start) = (own_memory("VmRSS")?, Instant::now());
        let all = self.register_on(&session, &fresh("service")).await?;
        let secs = start.elapsed().as_secs_f64();
        tokio::time::sleep(SETTLE).await;
        let after = own_memory("VmRSS")?;
        let mut line = self.line(secs, counters::Counters::new());
        let each = after.saturating_sub(before) as f64 * 1024.0 / self.count() as f64;
        line.extra.insert("rss_before_kib".into(), json!(before));
        line.extra.insert("rss_after_kib".into(), json!(after));
        line.extra.insert("bytes_each".into(), json!(each.round()));
        session.close().await?;
        drop(all);
        Ok(line)
    }

    async fn present(&self, root: &str) -> Result<usize> {
        let mut client = Client::connect([&self.options.endpoint], None).await?;
        let options = GetOptions::new().with_prefix().with_count_only();
        let answer = client.get(format!("{root}/"), Some(options)).await?;
        Ok(usize::try_from(answer.count())?)
    }

    fn line(&self, secs: f64, counted: counters::Counters) -> Line {
        let leases = counted.get("unary/LeaseGrant").copied().unwrap_or_default();
        let measured = Measured { secs, ops: self.count() as u64, counted, ..Measured::default() };
        let mut line = Line::new(PEER, "registry".into(), json!({ "n": self.count() }), measured);
        line.extra.insert("leases".into(), json!(leases));
        line
    }
}

fn instance(number: usize) -> Instance {
    let instance = Instance::new("courseware", "10.20.30.40:50051").id(number.to_string());
    instance.version("1.2.0").weight(10).metadata("zone", "a")
}
