from .conventions import check_floatx as check_floatx
from .distillation import load_teacher as load_teacher
from .distillation import make_distiller as make_distiller
from .plain_network import NetworkBuilder as NetworkBuilder
from .plain_network import build_network as build_network
from .plain_network import load_model as load_model
from .plain_network import recalibrate as recalibrate
from .supernet import Supernet as Supernet
