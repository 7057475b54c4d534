"""What several tests use; none may reach the network, and signals reach them also in the background."""

import signal
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from model import FlowSeg, ModelConfig

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners(size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Four flat quarters, all different, so that each of the eight orientations looks different."""
    image = Image.new("RGB", size, WHITE)
    width, height = size[0] // 2, size[1] // 2
    for color, place in ((RED, (0, 0)), (GREEN, (width, 0)), (BLUE, (0, height))):
        image.paste(color, (*place, place[0] + width, place[1] + height))
    return image


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def untrained(config: ModelConfig) -> FlowSeg:
    """A model with the same random weights each time; zeros would give every photo the same mask."""
    torch.manual_seed(0)
    model = FlowSeg(config).eval()
    for value in model.parameters():
        torch.nn.init.normal_(value.data, std=0.2)
    return model


def pytest_configure(config):
    # A shell that starts a command in the background, or nohup, has it ignore these.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
