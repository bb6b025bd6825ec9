"""Off-screen MuJoCo images on machines without a screen.

Sits below the simulators of ``prophet_gym.sims``: they hand over their ``MjModel`` and ``MjData`` and get ``uint8`` RGB
back. The OpenGL backend is chosen at run time: the one named by ``MUJOCO_GL`` if set, else EGL if it has a working
device, else OSMesa. Images are rendered ``supersampling`` times larger and averaged down, which is cheaper than
multisampling with a software rasteriser and lets objects move by fractions of a pixel.
"""

from __future__ import annotations

import atexit
import ctypes
import ctypes.util
import importlib
import os
import sys
import weakref
from functools import cache
from typing import Any

import cv2
import mujoco
import numpy as np

BACKENDS = ("egl", "osmesa")
_EGL_PLATFORM_DEVICE = 0x313F


class RenderingUnavailableError(RuntimeError):
    """No OpenGL library that renders without a screen was found; the message says how to install one."""


def _egl_works() -> bool:
    """Whether EGL has a device that initialises (a library without a driver is common in containers)."""
    name = ctypes.util.find_library("EGL")
    if name is None:
        return False
    try:
        egl = ctypes.CDLL(name)
        egl.eglGetProcAddress.restype = ctypes.c_void_p
        query_address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
        display_address = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    except (OSError, AttributeError):
        return False
    if not query_address or not display_address:
        return False
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(query_address)
    get_display = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(display_address)
    devices, count = (ctypes.c_void_p * 16)(), ctypes.c_int(0)
    if not query(16, devices, ctypes.byref(count)):
        return False
    egl.eglInitialize.argtypes = [ctypes.c_void_p] * 3
    for device in devices[: count.value]:
        display = get_display(_EGL_PLATFORM_DEVICE, device, None)
        if display and egl.eglInitialize(display, None, None):
            return True
    return False


@cache
def select_backend() -> str:
    """Name of the OpenGL backend that renders without a screen on this machine: ``"egl"`` or ``"osmesa"``.

    Returns:
        The backend; ``MUJOCO_GL`` decides when it names one of the two.

    Raises:
        RenderingUnavailableError: Neither EGL nor OSMesa works.
    """
    requested = os.environ.get("MUJOCO_GL", "").lower()
    if requested in BACKENDS:
        return requested
    if _egl_works():
        return "egl"
    if ctypes.util.find_library("OSMesa") is not None:
        return "osmesa"
    raise RenderingUnavailableError(
        "MuJoCo cannot render: neither EGL nor OSMesa was found. Install one of them, for example "
        "'apt-get install libosmesa6' (software) or 'apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri', "
        "or set MUJOCO_GL to 'egl' or 'osmesa' if a library lies outside the standard path."
    )


def claim_backend() -> str:
    """Bind this process to the backend of :func:`select_backend`, for everyone who renders with MuJoCo in it.

    Returns:
        The backend; the one that PyOpenGL has been imported with, where it has been.

    Raises:
        RenderingUnavailableError: Neither EGL nor OSMesa works.
    """
    backend = select_backend()
    # PyOpenGL binds to one platform per process, at its first import.
    bound = os.environ.get("PYOPENGL_PLATFORM")
    if bound and bound.lower() != backend and "OpenGL" in sys.modules:
        backend = bound.lower()
    else:
        os.environ["PYOPENGL_PLATFORM"] = backend
    os.environ["MUJOCO_GL"] = backend  # the C side resolves OpenGL functions through the backend named here
    return backend


def _make_context(size: int) -> Any:
    backend = claim_backend()
    try:
        module = importlib.import_module(f"mujoco.{backend}")
        return module.GLContext(size, size)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise RenderingUnavailableError(
            f"MuJoCo's {backend} backend failed ({error}). Set MUJOCO_GL to the other of {BACKENDS}, or install its "
            "library: 'apt-get install libosmesa6' for OSMesa, or "
            "'apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri' for EGL."
        ) from error


_open_renderers: weakref.WeakSet[OffscreenRenderer] = weakref.WeakSet()


@cache
def _close_all_at_exit() -> None:
    """Registered after the first context: exit handlers run in reverse, so before MuJoCo's own ends the display."""

    def close_all() -> None:
        for renderer in list(_open_renderers):
            renderer.close()

    atexit.register(close_all)


class OffscreenRenderer:
    """Square RGB images and pixel masks of one fixed camera of a MuJoCo model.

    Args:
        model: The model; its off-screen buffer is set to ``size * supersampling`` pixels without multisampling.
        camera: Name of a camera of the model.
        size: Side of the returned image in pixels.
        supersampling: Rendered pixels per returned pixel and axis.

    Raises:
        RenderingUnavailableError: No OpenGL backend works without a screen.
    """

    def __init__(self, model: mujoco.MjModel, camera: str, size: int = 64, supersampling: int = 3) -> None:
        self._context = None
        self._model, self._size, self._supersampling = model, size, supersampling
        self._side = size * supersampling
        self._scene = mujoco.MjvScene(model, maxgeom=64)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        self._options = mujoco.MjvOption()
        self._perturb = mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._camera.fixedcamid = model.camera(camera).id
        model.vis.global_.offwidth = model.vis.global_.offheight = self._side
        model.vis.quality.offsamples = 0
        self._context = _make_context(self._side)
        self._context.make_current()
        self._gl = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._gl)
        _open_renderers.add(self)
        _close_all_at_exit()

    def render(self, data: mujoco.MjData) -> np.ndarray:
        """Image of the current state.

        Args:
            data: State with up-to-date kinematics.

        Returns:
            RGB image (H, W, 3) uint8, a fresh array.
        """
        pixels = self._draw(data, self._side)
        if self._supersampling == 1:
            return np.ascontiguousarray(pixels[::-1])
        return cv2.resize(pixels[::-1], (self._size, self._size), interpolation=cv2.INTER_AREA)

    def mask(self, data: mujoco.MjData, geom: int) -> np.ndarray:
        """Visible pixels of one geom.

        Args:
            data: State with up-to-date kinematics.
            geom: Id of the geom.

        Returns:
            Boolean mask (H, W), one sample per pixel.
        """
        flags = self._scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = True
        pixels = self._draw(data, self._size).astype(np.int32)
        flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = False
        segment = pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2] - 1  # 0 is the background
        drawn = self._scene.geoms[: self._scene.ngeom]
        wanted = [item.segid for item in drawn if item.objid == geom and item.objtype == mujoco.mjtObj.mjOBJ_GEOM]
        return np.isin(segment[::-1], wanted)

    def close(self) -> None:
        """Free the OpenGL context; the renderer cannot be used afterwards."""
        if self._context is not None:
            self._context.make_current()
            self._gl.free()
            self._context.free()
            self._context = None

    def __del__(self) -> None:
        self.close()

    def _draw(self, data: mujoco.MjData, side: int) -> np.ndarray:
        """Rendered rows from bottom to top, (side, side, 3) uint8."""
        if self._context is None:
            raise ValueError("This renderer was closed. Make a new simulator.")
        self._context.make_current()
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, data, self._options, self._perturb, self._camera, everything, self._scene)
        viewport = mujoco.MjrRect(0, 0, side, side)
        mujoco.mjr_render(viewport, self._scene, self._gl)
        pixels = np.empty((side, side, 3), np.uint8)
        mujoco.mjr_readPixels(pixels, None, viewport, self._gl)
        return pixels
