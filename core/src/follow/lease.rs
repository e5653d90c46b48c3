//! The claim of an instance on a lane of the log. Several instances share the lanes, and each lane is assigned to one
//! instance at a time.

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::follow::{
    peer::Peer,
    worker::{Stop, Worker},
};

/// How often to check a lane that an operator has paused, or that another instance still holds.
const HANDOVER_TICK: Duration = Duration::from_millis(200);

/// The right to follow a lane. A process that does not share its store always has this right.
#[derive(Clone)]
pub(crate) struct LaneLease {
    instance: Option<Peer>,
    subscription: Arc<str>,
    lane: u32,
}

/// The result of waiting until a lane is assigned to this instance.
pub(crate) enum Turn {
    /// The lane is assigned to this instance. The value is the checkpoint that the worker has read; `None` if the lane
    /// has no checkpoint yet.
    Acquired(Option<i64>),
    Shutdown,
}

impl LaneLease {
    pub fn new(instance: Option<&Peer>, subscription: &Arc<str>, lane: u32) -> Self {
        if let Some(instance) = instance {
            instance.follow(subscription);
        }
        Self { instance: instance.cloned(), subscription: subscription.clone(), lane }
    }

    /// Waits until the lane is assigned to this instance, and is neither paused nor held by another living instance.
    /// When this method returns, `worker` has loaded the checkpoint. The caller then claims the lane with
    /// [`hold`](Self::hold).
    pub async fn turn(&self, worker: &mut Worker, shutdown: &CancellationToken) -> Result<Turn, Stop> {
        loop {
            if let Some(instance) = &self.instance {
                if !instance.has_turn(&self.subscription, self.lane) {
                    worker.reporter.elsewhere("another instance holds the lane");
                }
                tokio::select! {
                    () = instance.turns(&self.subscription, self.lane, true) => {}
                    () = shutdown.cancelled() => return Ok(Turn::Shutdown),
                }
            }
            worker.history = worker.store.history();
            let next = worker.lanes[0].load(&*worker.store).await?;
            let lane = &worker.lanes[0];
            let holder = self.instance.as_ref().and_then(|instance| {
                lane.holder.clone().filter(|holder| holder != instance.name() && instance.is_alive(holder))
            });
            match holder {
                _ if lane.paused => worker.reporter.elsewhere("an operator has paused the subscription"),
                Some(holder) => worker.reporter.elsewhere(&format!("instance {holder} has not released the lane yet")),
                None => return Ok(Turn::Acquired(next)),
            }
            tokio::select! {
                () = tokio::time::sleep(HANDOVER_TICK) => {}
                () = shutdown.cancelled() => return Ok(Turn::Shutdown),
            }
        }
    }

    /// Claims the lane at this position and fences the previous holder. Does nothing in a process that does not share
    /// its store; there, the first commit of the worker fences an earlier worker.
    pub async fn hold(&self, worker: &mut Worker, next: i64) -> Result<(), Stop> {
        let Some(instance) = &self.instance else { return Ok(()) };
        let lane = &mut worker.lanes[0];
        lane.holder = Some(instance.name().clone());
        lane.epoch += 1;
        worker.put_checkpoint(next).await
    }

    /// Releases the lane, so that the next instance does not have to wait until this instance is considered dead.
    pub async fn release(&self, worker: &mut Worker, next: i64) -> Result<(), Stop> {
        if self.instance.is_none() {
            return Ok(());
        }
        worker.lanes[0].holder = None;
        worker.put_checkpoint(next).await
    }

    /// Resolves once the lane is assigned to another instance.
    pub async fn ends(&self) {
        match &self.instance {
            Some(instance) => instance.turns(&self.subscription, self.lane, false).await,
            None => std::future::pending().await,
        }
    }

    /// Returns whether the lane is assigned to another instance.
    pub fn has_ended(&self) -> bool {
        self.instance.as_ref().is_some_and(|instance| !instance.has_turn(&self.subscription, self.lane))
    }
}
