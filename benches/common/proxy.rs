//! A TCP proxy that delays every byte by a fixed time each way: a longer way to etcd.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::Result;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::unbounded_channel;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Runs until dropped.
pub(crate) struct DelayProxy {
    pub(crate) url: String,
    _tasks: JoinSet<()>,
}

impl DelayProxy {
    pub(crate) async fn start(target: &str, delay: Duration) -> Result<Self> {
        let target = target.trim_start_matches("http://").trim_end_matches('/').to_owned();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let url = format!("http://{}", listener.local_addr()?);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let target = target.clone();
                // A connection that fails is seen by the client as one that closes.
                connections.spawn(async move { forward(client, &target, delay).await });
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Self { url, _tasks: tasks })
    }
}

async fn forward(client: TcpStream, target: &str, delay: Duration) -> Result<()> {
    let server = TcpStream::connect(target).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::try_join!(pipe(from_client, to_server, delay), pipe(from_server, to_client, delay))?;
    Ok(())
}

/// Copies one direction. Reading goes on while bytes wait for their time.
async fn pipe(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, delay: Duration) -> Result<()> {
    let (sender, mut waiting) = unbounded_channel::<(Instant, Vec<u8>)>();
    let read = async move {
        let mut buffer = vec![0; 32 * 1024];
        loop {
            let length = from.read(&mut buffer).await?;
            if length == 0 || sender.send((Instant::now() + delay, buffer[..length].to_vec())).is_err() {
                return anyhow::Ok(());
            }
        }
    };
    let write = async move {
        while let Some((due, bytes)) = waiting.recv().await {
            tokio::time::sleep_until(due).await;
            to.write_all(&bytes).await?;
        }
        Ok(())
    };
    tokio::try_join!(read, write)?;
    Ok(())
}
