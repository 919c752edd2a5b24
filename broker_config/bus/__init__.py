"""The bus: typed publish and subscribe over one MQTT session. `Bus` is what the rest of the system needs of it."""

from broker_config.bus.calls import Correlated, request
from broker_config.bus.contract import Bus, BusState, Handler, Subscription, Will
from broker_config.bus.routes import Route, Routes
from broker_config.bus.session import MqttBus

__all__ = [
    "Bus",
    "BusState",
    "Correlated",
    "Handler",
    "MqttBus",
    "Route",
    "Routes",
    "Subscription",
    "Will",
    "request",
]
